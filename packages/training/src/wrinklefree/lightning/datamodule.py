"""One item for Lightning is one optimizer step: the micro-batches of this rank.

So Lightning never stops inside an accumulation window, and there is nothing of a half step to save.
"""

from collections.abc import Iterator

import pytorch_lightning as pl

from data_handler import Batch, TrainingLoader


class StepBatches:
    """Micro-batches of a loader in groups of an optimizer step."""

    def __init__(self, loader: TrainingLoader, accumulation: int) -> None:
        self.loader = loader
        self.accumulation = accumulation

    def __iter__(self) -> Iterator[list[Batch]]:
        group: list[Batch] = []
        for batch in self.loader:
            group.append(batch)
            if len(group) == self.accumulation:
                yield group
                group = []

    def __len__(self) -> int:
        """Optimizer steps that are left."""
        return len(self.loader) // self.accumulation


class WrinkleFreeDataModule(pl.LightningDataModule):
    """The training mixture, from wherever its loader stands."""

    def __init__(self, loader: TrainingLoader, accumulation: int) -> None:
        super().__init__()
        self.loader = loader
        self.accumulation = accumulation

    def train_dataloader(self) -> StepBatches:
        return StepBatches(self.loader, self.accumulation)

    def transfer_batch_to_device(
        self, batch: list[Batch], device: object, dataloader_idx: int
    ) -> list[Batch]:
        return [micro.to(device, non_blocking=True) for micro in batch]  # type: ignore[arg-type]
