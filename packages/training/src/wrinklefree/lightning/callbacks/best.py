"""`checkpoints/best`: the run as it was at its smallest validation loss at λ = μ = 1.

Below 1 the loss is lower still, and says nothing about the model that will be exported.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from wrinklefree.lightning.callbacks.validation import ValidationCallback
from wrinklefree.lightning.module import WrinkleFreeLightningModule


class BestCheckpointCallback(pl.Callback):
    """`save(target)` writes a checkpoint of the run as it is now; called on rank 0, the others wait."""

    def __init__(self, target: Path, save: Callable[[Path], None], validation: ValidationCallback) -> None:
        self.target = target
        self.validation = validation
        self.loss = math.inf
        self.step = 0
        self._save = save

    def state_dict(self) -> dict[str, Any]:
        """Without a loss while there is none: json has no infinity."""
        return {"loss": self.loss if math.isfinite(self.loss) else None, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss = math.inf if state["loss"] is None else state["loss"]
        self.step = state["step"]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, WrinkleFreeLightningModule)
        loss = self.validation.loss_of(pl_module.progress.step)
        if loss is None or not loss < self.loss:  # NaN is never the best
            return
        self.loss, self.step = loss, pl_module.progress.step
        if trainer.is_global_zero:
            self._save(self.target)
        trainer.strategy.barrier()
