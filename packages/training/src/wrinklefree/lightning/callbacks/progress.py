"""What a run says while it runs: losses, dials, speed, memory, time left.

In a terminal one line that is rewritten after every step, elsewhere a line for the first step of a life and
then every so many. Speed, MFU and time left are those of the steps since the line before.
"""

import time
from typing import Any

import pytorch_lightning as pl
import torch

from wrinklefree.lightning.callbacks.ramps import RampCallback
from wrinklefree.lightning.module import StepReport, WrinkleFreeLightningModule
from wrinklefree.terminal import LiveLine, clock, megabytes
from wrinklefree.training.flops import flops_per_token, multiplications_per_second
from wrinklefree.training.memory import memory_in_use

WORTH_SAYING = 0.05
"""Of the time: who waits less for data, or asks the teacher for less, need not hear of it."""


class ProgressCallback(pl.Callback):
    """Only looks: it holds nothing that a checkpoint would need."""

    def __init__(self, ramps: RampCallback, *, every: int, block_size: int) -> None:
        self.ramps = ramps
        self.every = every
        self.block_size = block_size
        self.line = LiveLine()
        self.tokens_at_full_speed: float | None = None
        """Per second, if all of this device's multiplying went into the model."""
        self._start_counting()
        self._has_printed = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, WrinkleFreeLightningModule)
        flops = flops_per_token(pl_module.model, self.block_size)
        dtype = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
        speed = multiplications_per_second(pl_module.device, dtype)
        if flops is not None and speed is not None:
            self.tokens_at_full_speed = speed * trainer.world_size / flops
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
        self._num_run += report.num_tokens * pl_module.objective_manager.num_parts
        self._data_seconds += report.data_wait_seconds
        self._teacher_seconds += report.teacher_seconds
        is_due = not self._has_printed or report.step % self.every == 0 or report.step == pl_module.max_steps
        if is_due or self.line.is_live:
            self.line.show(self._line(report, pl_module), keep=is_due)
        if is_due:
            self._has_printed = True
            self._start_counting()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.line.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.line.close()

    def _start_counting(self) -> None:
        self._since, self._num_steps, self._num_tokens = time.perf_counter(), 0, 0
        self._num_run = 0
        """Tokens, those of masked views included."""
        self._data_seconds = self._teacher_seconds = 0.0

    def _line(self, report: StepReport, module: WrinkleFreeLightningModule) -> str:
        seconds = time.perf_counter() - self._since
        left = (module.max_steps - report.step) * seconds / self._num_steps
        speed = self._num_tokens / seconds
        amounts = self.ramps.amounts
        parts = [
            f"step {report.step}/{module.max_steps}",
            f"loss {report.loss:.4f}",
            *(f"{name} {value:.4f}" for name, value in report.losses.items()),
            f"λ {amounts['lambda']:.2f}",
            f"μ {amounts['mu']:.2f}",
            f"lr {report.lr:.2e}",
            f"|g| {report.grad_norm:.2f}",
            f"{speed:,.0f} tokens/s",
        ]
        for name, waited in (("data", self._data_seconds), ("teacher", self._teacher_seconds)):
            if waited >= WORTH_SAYING * seconds:
                parts.append(f"{name} {waited / seconds:.0%} of the time")
        if self.tokens_at_full_speed is not None:
            parts.append(f"MFU {self._num_run / seconds / self.tokens_at_full_speed:.1%}")
        parts += [f"memory {megabytes(memory_in_use(module.device))}", f"{clock(left)} left"]
        return "  ".join(parts)
