"""A row of `metrics.jsonl` for every step, and a printed line now and then."""

import sys
import time

import pytorch_lightning as pl

from data_handler import MixtureSchedule
from wrinklefree.lightning.callbacks.ramps import RampCallback
from wrinklefree.lightning.module import StepReport, WrinkleFreeLightningModule
from wrinklefree.training.metrics import MetricsWriter


class MetricsCallback(pl.Callback):
    """The only writer of metrics is rank 0."""

    def __init__(
        self,
        writer: MetricsWriter | None,
        ramps: RampCallback,
        schedule: MixtureSchedule,
        *,
        log_interval: int,
    ) -> None:
        self.writer = writer
        self.ramps = ramps
        self.schedule = schedule
        self.log_interval = log_interval
        self._last = time.perf_counter()
        self._since_line = (time.perf_counter(), 0, 0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = time.perf_counter()
        self._since_line = (self._last, 0, 0)

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
                "samples": report.samples,
                "weights": self.schedule.weights(max(report.samples)),
                "lambda": self.ramps.amounts["lambda"],
                "mu": self.ramps.amounts["mu"],
                "lr": report.lr,
                "grad_norm": report.grad_norm,
                "tokens": pl_module.progress.num_tokens,
                "tokens_per_second": report.num_tokens / seconds,
                "skipped": not report.is_finite,
            },
        )
        self._print(report, pl_module, now)

    def _print(self, report: StepReport, module: WrinkleFreeLightningModule, now: float) -> None:
        since, tokens, steps = self._since_line
        self._since_line = (since, tokens + report.num_tokens, steps + 1)
        is_first = steps == 0 and module.progress.step == report.step and since == self._since_line[0]
        due = report.step % self.log_interval == 0 or report.step == module.max_steps
        if not due and not (is_first and report.step == 1):
            return
        speed = (tokens + report.num_tokens) / (now - since)
        left = (module.max_steps - report.step) * (now - since) / (steps + 1)
        self._since_line = (now, 0, 0)
        losses = "  ".join(f"{name} {value:.4f}" for name, value in report.losses.items())
        amounts = self.ramps.amounts
        print(
            f"step {report.step}/{module.max_steps}  loss {report.loss:.4f}  {losses}  "
            f"λ {amounts['lambda']:.2f}  μ {amounts['mu']:.2f}  lr {report.lr:.2e}  "
            f"|g| {report.grad_norm:.2f}  {speed:,.0f} tokens/s  {_clock(left)} left",
            file=sys.stdout,
            flush=True,
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
