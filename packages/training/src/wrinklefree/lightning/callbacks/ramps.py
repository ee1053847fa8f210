"""λ, μ and the sparsity of activations go from 0 to 1 over the first steps; how is `bitnet_arch`'s."""

from collections.abc import Mapping

import pytorch_lightning as pl
from torch import nn

from bitnet_arch import (
    Schedule,
    Sparsity,
    ramp_amount,
    set_quant_amount,
    set_sparsity,
    set_subln_amount,
)
from wrinklefree.config.schema import TrainingConfig
from wrinklefree.lightning.module import WrinkleFreeLightningModule


class RampCallback(pl.Callback):
    """Sets the dials before each step, from the step alone: there is nothing to restore."""

    def __init__(self, training: TrainingConfig) -> None:
        self.sparsity = training.activation_sparsity
        self.shapes: dict[str, Schedule] = {
            "lambda": training.lambda_warmup.schedule,
            "mu": training.subln_warmup.schedule,
        }
        if self.sparsity.enabled:
            self.shapes["sparsity"] = self.sparsity.warmup.schedule
        self.amounts = dict.fromkeys(self.shapes, -1.0)
        """Dial → where it stands; -1 before the first step."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, WrinkleFreeLightningModule)
        progress = pl_module.progress
        step = progress.step - progress.schedule_start
        wanted = {
            name: ramp_amount(step, progress.ramp_steps[name], shape) for name, shape in self.shapes.items()
        }
        changed = {name: amount for name, amount in wanted.items() if amount != self.amounts[name]}
        self.set(pl_module.model, changed)
        self.amounts = wanted

    def set(self, model: nn.Module, amounts: Mapping[str, float]) -> None:
        """Turn these dials of the model, and remember nothing."""
        for name, amount in amounts.items():
            match name:
                case "lambda":
                    set_quant_amount(model, amount)
                case "mu":
                    set_subln_amount(model, amount)
                case "sparsity":
                    set_sparsity(model, self._sparsity(amount))

    def everywhere(self, amount: float) -> dict[str, float]:
        """Every dial at one amount."""
        return dict.fromkeys(self.shapes, amount)

    def numbers(self) -> dict[str, float]:
        """What a row of metrics says beside λ and μ."""
        if not self.sparsity.enabled:
            return {}
        return {"sparsity": self.sparsity.target_ratio * max(0.0, self.amounts["sparsity"])}

    def _sparsity(self, amount: float) -> Sparsity | None:
        ratio = self.sparsity.target_ratio * amount
        return Sparsity(ratio, block=self.sparsity.block_width) if ratio > 0 else None
