"""One item for Lightning is one optimizer step: the micro-batches of this rank.

So Lightning never stops inside an accumulation window, and there is nothing of a half step to save.
"""

import time
from collections.abc import Iterator

import pytorch_lightning as pl

from data_handler import Batch, TrainingLoader


class StepBatches:
    """Micro-batches of a loader in groups of an optimizer step."""

    def __init__(self, loader: TrainingLoader, accumulation: int) -> None:
        self.loader = loader
        self.accumulation = accumulation
        self.seconds = 0.0
        """Spent waiting for the loader."""

    def __iter__(self) -> Iterator[list[Batch]]:
        group: list[Batch] = []
        started = time.perf_counter()
        for batch in self.loader:
            group.append(batch)
            if len(group) == self.accumulation:
                self.seconds += time.perf_counter() - started
                yield group
                group = []
                started = time.perf_counter()

    def __len__(self) -> int:
        """Optimizer steps that are left."""
        return len(self.loader) // self.accumulation


class WrinkleFreeDataModule(pl.LightningDataModule):
    """The training mixture, from wherever its loader stands."""

    def __init__(self, loader: TrainingLoader, accumulation: int) -> None:
        super().__init__()
        self._batches = StepBatches(loader, accumulation)

    def train_dataloader(self) -> StepBatches:
        return self._batches

    def take_seconds(self) -> float:
        """How long was waited for data since the last time somebody asked."""
        seconds, self._batches.seconds = self._batches.seconds, 0.0
        return seconds

    def transfer_batch_to_device(
        self, batch: list[Batch], device: object, dataloader_idx: int
    ) -> list[Batch]:
        return [micro.to(device, non_blocking=True) for micro in batch]  # type: ignore[arg-type]
