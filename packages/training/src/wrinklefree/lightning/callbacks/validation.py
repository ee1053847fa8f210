"""Held-out loss of every domain: at the present λ and μ, and at 1, which is what will be exported.

At step 0 it is measured at λ = μ = 0, too: the model as it was before conversion. Nothing of it touches
random numbers, data or weights: a run with validation has the same bits as one without.
"""

import math
from collections.abc import Mapping

import pytorch_lightning as pl

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
        self.latest: tuple[int, float] | None = None
        """Step and mean loss at λ = μ = 1 of the last validation in this life, equal on all ranks."""

    def loss_of(self, step: int) -> float | None:
        """Of this step's validation; none when there was none."""
        return self.latest[1] if self.latest is not None and self.latest[0] == step else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, WrinkleFreeLightningModule)
        if pl_module.progress.step == 0:
            self.validate(
                pl_module, {"full precision": self.ramps.everywhere(0), "at 1": self.ramps.everywhere(1)}
            )

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
            now = self.ramps.amounts
            means = self.validate(pl_module, {"now": now, "at 1": self.ramps.everywhere(1)})
            if means:
                # Decisions hang on it, and ranks on different machines may differ in the last bits.
                self.latest = step, trainer.strategy.broadcast(means["at 1"])

    def validate(
        self, module: WrinkleFreeLightningModule, dials: Mapping[str, Mapping[str, float]]
    ) -> dict[str, float]:
        """Mean loss at each setting of the dials: measure, write a row, put the dials back."""
        if not self.probes or self.config.num_batches == 0:
            return {}
        was_training = module.model.training
        module.model.eval()
        losses: dict[str, dict[str, float]] = {}
        for name, amounts in dials.items():
            self.ramps.set(module.model, amounts)
            losses[name] = held_out_losses(
                module.model,
                self.probes,
                block_size=self.block_size,
                batch_size=self.config.batch_size,
                num_batches=self.config.num_batches,
                device=module.device,
            )
        if self.ramps.amounts["lambda"] >= 0:
            self.ramps.set(module.model, self.ramps.amounts)
        module.model.train(was_training)
        means = {name: sum(each.values()) / len(each) for name, each in losses.items() if each}
        if self.writer is not None:
            row = {"step": module.progress.step, "losses": losses}
            self.writer.write("val", row)
            text = "  ".join(
                f"{name} {value:.4f} (ppl {_perplexity(value):.4g})" for name, value in means.items()
            )
            print(f"validation at step {module.progress.step}: {text}", flush=True)
        return means


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
