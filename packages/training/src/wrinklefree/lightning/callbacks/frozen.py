"""Proof that what is frozen was not touched: one sha256 over it, from the first step to the last.

It is in every checkpoint, so a resumed run is compared with where the run began.
"""

import hashlib

import pytorch_lightning as pl
import torch
from torch import nn

from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.training.metrics import MetricsWriter


class FrozenCallback(pl.Callback):
    """For runs that train a part of the model. Rank 0 looks."""

    def __init__(self, writer: MetricsWriter | None) -> None:
        self.writer = writer
        self.sha256: str | None = None

    def state_dict(self) -> dict[str, str | None]:
        return {"sha256": self.sha256}

    def load_state_dict(self, state: dict[str, str | None]) -> None:
        self.sha256 = state["sha256"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, WrinkleFreeLightningModule)
        if self.writer is not None:
            self._compare(pl_module.model)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, WrinkleFreeLightningModule)
        if self.writer is None:
            return
        self._compare(pl_module.model)
        step = pl_module.progress.step
        self.writer.write("event", {"event": "frozen_unchanged", "step": step, "sha256": self.sha256})

    def _compare(self, model: nn.Module) -> None:
        now = frozen_sha256(model)
        if self.sha256 not in (None, now):
            raise RuntimeError("weights that are frozen were changed")
        self.sha256 = now


@torch.no_grad()
def frozen_sha256(model: nn.Module) -> str:
    """Over names and bytes of all parameters that do not learn."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
