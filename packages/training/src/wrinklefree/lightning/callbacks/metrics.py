"""A row of `metrics.jsonl` for every step."""

import time

import pytorch_lightning as pl

from data_handler import MixtureSchedule
from wrinklefree.lightning.callbacks.ramps import RampCallback
from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.training.metrics import MetricsWriter


class MetricsCallback(pl.Callback):
    """The only writer of metrics is rank 0."""

    def __init__(
        self,
        writer: MetricsWriter | None,
        ramps: RampCallback,
        schedule: MixtureSchedule,
    ) -> None:
        self.writer = writer
        self.ramps = ramps
        self.schedule = schedule
        self._last = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = time.perf_counter()

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
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if self.writer is None:
            return
        self.writer.write(
            "step",
            {
                "step": report.step,
                "loss": report.loss,
                "losses": report.losses,
                "objective_weights": pl_module.objective_manager.weights,
                "samples": report.samples,
                "weights": self.schedule.weights(max(report.samples)),
                "lambda": self.ramps.amounts["lambda"],
                "mu": self.ramps.amounts["mu"],
                "lr": report.lr,
                "grad_norm": report.grad_norm,
                "tokens": pl_module.progress.num_tokens,
                "tokens_per_second": report.num_tokens / seconds,
                "data_wait_seconds": report.data_wait_seconds,
                "teacher_seconds": report.teacher_seconds,
                "skipped": not report.is_finite,
                **self.ramps.numbers(),
                **report.numbers,
            },
        )
