"""A printed line for the first step of a life and then every so many: losses, dials, speed, time left."""

import time

import pytorch_lightning as pl

from wrinklefree.lightning.callbacks.ramps import RampCallback
from wrinklefree.lightning.module import StepReport, WrinkleFreeLightningModule


class ProgressCallback(pl.Callback):
    """Speed and time left are those of the steps since the line before."""

    def __init__(self, ramps: RampCallback, *, every: int) -> None:
        self.ramps = ramps
        self.every = every
        self._start_counting()
        self._has_printed = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_counting()

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
        self._num_steps += 1
        self._num_tokens += report.num_tokens
        if not self._has_printed or report.step % self.every == 0 or report.step == pl_module.max_steps:
            print(self._line(report, pl_module.max_steps), flush=True)
            self._has_printed = True
            self._start_counting()

    def _start_counting(self) -> None:
        self._since, self._num_steps, self._num_tokens = time.perf_counter(), 0, 0

    def _line(self, report: StepReport, max_steps: int) -> str:
        seconds = time.perf_counter() - self._since
        left = (max_steps - report.step) * seconds / self._num_steps
        losses = "  ".join(f"{name} {value:.4f}" for name, value in report.losses.items())
        amounts = self.ramps.amounts
        return (
            f"step {report.step}/{max_steps}  loss {report.loss:.4f}  {losses}  "
            f"λ {amounts['lambda']:.2f}  μ {amounts['mu']:.2f}  lr {report.lr:.2e}  "
            f"|g| {report.grad_norm:.2f}  {self._num_tokens / seconds:,.0f} tokens/s  {_clock(left)} left"
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
