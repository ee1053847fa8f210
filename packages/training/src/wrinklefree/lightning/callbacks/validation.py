"""Held-out loss of every domain: at the present λ and μ, and at 1, which is what will be exported.

At step 0 it is measured at λ = μ = 0, too: the model as it was before conversion. Nothing of it touches
random numbers, data or weights: a run with validation has the same bits as one without.
"""

import math
from collections.abc import Mapping

import pytorch_lightning as pl

from bitnet_arch import set_quant_amount, set_subln_amount
from data_handler.probes import Probe
from wrinklefree.config.schema import ValidationConfig
from wrinklefree.lightning.callbacks.ramps import RampCallback
from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.training.evaluation import held_out_losses
from wrinklefree.training.metrics import MetricsWriter


class ValidationCallback(pl.Callback):
    """Every rank measures the same; rank 0 writes."""

    def __init__(
        self,
        config: ValidationConfig,
        probes: Mapping[str, Probe],
        ramps: RampCallback,
        *,
        block_size: int,
        writer: MetricsWriter | None,
    ) -> None:
        self.config = config
        self.probes = probes
        self.ramps = ramps
        self.block_size = block_size
        self.writer = writer

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, WrinkleFreeLightningModule)
        if pl_module.progress.step == 0:
            self.validate(pl_module, {"full precision": (0.0, 0.0), "at 1": (1.0, 1.0)})

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, WrinkleFreeLightningModule)
        step = pl_module.progress.step
        due = self.config.every is not None and step % self.config.every == 0
        if due or step == pl_module.max_steps:
            now = (self.ramps.amounts["lambda"], self.ramps.amounts["mu"])
            self.validate(pl_module, {"now": now, "at 1": (1.0, 1.0)})

    def validate(self, module: WrinkleFreeLightningModule, dials: Mapping[str, tuple[float, float]]) -> None:
        """Measure at each setting of (λ, μ), write a row, and put the dials back."""
        if not self.probes or self.config.num_batches == 0:
            return
        before = (self.ramps.amounts["lambda"], self.ramps.amounts["mu"])
        was_training = module.model.training
        module.model.eval()
        losses: dict[str, dict[str, float]] = {}
        for name, (quant, subln) in dials.items():
            set_quant_amount(module.model, quant)
            set_subln_amount(module.model, subln)
            losses[name] = held_out_losses(
                module.model,
                self.probes,
                block_size=self.block_size,
                batch_size=self.config.batch_size,
                num_batches=self.config.num_batches,
                device=module.device,
            )
        if before[0] >= 0:
            set_quant_amount(module.model, before[0])
            set_subln_amount(module.model, before[1])
        module.model.train(was_training)
        if self.writer is not None:
            row = {"step": module.progress.step, "losses": losses}
            self.writer.write("val", row)
            mean = {name: sum(each.values()) / len(each) for name, each in losses.items()}
            text = "  ".join(
                f"{name} {value:.4f} (ppl {_perplexity(value):.4g})" for name, value in mean.items()
            )
            print(f"validation at step {module.progress.step}: {text}", flush=True)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
