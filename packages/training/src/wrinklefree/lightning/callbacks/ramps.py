"""λ and μ go from 0 to 1 over the first steps; when is decided here, how in `bitnet_arch`."""

import pytorch_lightning as pl

from bitnet_arch import Schedule, ramp_amount, set_quant_amount, set_subln_amount
from wrinklefree.lightning.module import WrinkleFreeLightningModule


class RampCallback(pl.Callback):
    """Sets both dials before each step, from the step alone: there is nothing to restore."""

    def __init__(self, lambda_shape: Schedule, subln_shape: Schedule) -> None:
        self.shapes = {"lambda": lambda_shape, "mu": subln_shape}
        self.amounts = {"lambda": -1.0, "mu": -1.0}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, WrinkleFreeLightningModule)
        progress = pl_module.progress
        step = progress.step - progress.schedule_start
        for name, set_amount in (("lambda", set_quant_amount), ("mu", set_subln_amount)):
            amount = ramp_amount(step, progress.ramp_steps[name], self.shapes[name])
            if amount != self.amounts[name]:
                set_amount(pl_module.model, amount)
                self.amounts[name] = amount
