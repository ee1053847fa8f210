"""Steps whose loss or gradient is no finite number are left out and written down; too many end the run."""

import logging

import pytorch_lightning as pl

from durable import ExitCode, UserError
from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.training.metrics import MetricsWriter

logger = logging.getLogger(__name__)


class NonFiniteCallback(pl.Callback):
    """Counts skipped steps in a row; all ranks see the same numbers, so all leave together."""

    def __init__(self, writer: MetricsWriter | None, *, max_skipped: int) -> None:
        self.writer = writer
        self.max_skipped = max_skipped
        self.in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.in_a_row = state["in_a_row"]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, WrinkleFreeLightningModule)
        report = pl_module.report
        assert report is not None
        self.in_a_row = 0 if report.is_finite else self.in_a_row + 1
        if report.is_finite:
            return
        numbers = {"loss": report.loss, "grad_norm": report.grad_norm, "losses": report.losses}
        if self.writer is not None:
            event = {"event": "non_finite", "step": report.step, "samples": report.samples, **numbers}
            self.writer.write("event", event)
        logger.warning(
            "step %d was left out: loss %r, gradient norm %r", report.step, report.loss, report.grad_norm
        )
        if self.in_a_row > self.max_skipped:
            first, last = min(report.samples), max(report.samples)
            raise UserError(
                f"training: diverged, {self.in_a_row} steps in a row had no finite loss or gradient",
                f"step {report.step}, samples {first} to {last}",
                "lower the learning rate, or look at those samples; metrics.jsonl lists them",
                ExitCode.DIVERGED,
            )
