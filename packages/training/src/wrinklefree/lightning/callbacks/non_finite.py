"""Steps whose loss or gradient is no finite number are left out and written down; too many end the run.

`non_finite/step_000012.json` in the run directory: losses, gradient norm, the parameters whose gradients are
not finite, and how the samples of the step begin.
"""

import json
import logging
import math
from pathlib import Path

import pytorch_lightning as pl
from transformers import PreTrainedTokenizerBase

from durable import ExitCode, UserError, publish_file
from wrinklefree.lightning.module import StepReport, WrinkleFreeLightningModule
from wrinklefree.training.metrics import MetricsWriter

logger = logging.getLogger(__name__)


class NonFiniteCallback(pl.Callback):
    """Counts skipped steps in a row; all ranks see the same numbers, so all leave together."""

    def __init__(
        self,
        writer: MetricsWriter | None,
        directory: Path,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        max_skipped: int,
    ) -> None:
        self.writer = writer
        self.directory = directory
        self.tokenizer = tokenizer
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
            self._dump(report)
        logger.warning(
            "step %d was left out: loss %r, gradient norm %r", report.step, report.loss, report.grad_norm
        )
        if self.in_a_row > self.max_skipped:
            first, last = min(report.samples), max(report.samples)
            raise UserError(
                f"training: diverged, {self.in_a_row} steps in a row had no finite loss or gradient",
                f"step {report.step}, samples {first} to {last}",
                "lower the learning rate, or look at those samples; non_finite/ shows how they begin",
                ExitCode.DIVERGED,
            )

    def _dump(self, report: StepReport) -> None:
        found = report.not_finite
        assert found is not None
        losses = {"loss": report.loss, **report.losses, "grad_norm": report.grad_norm}
        content = {
            "step": report.step,
            "losses": {name: repr(value) for name, value in losses.items()},
            "not_finite": [name for name, value in losses.items() if not math.isfinite(value)],
            "parameters": found.parameters,
            "samples": {
                str(sample): {"tokens": tokens, "text": self._text(tokens)}
                for sample, tokens in found.beginnings.items()
            },
        }
        folder = self.directory / "non_finite"
        folder.mkdir(exist_ok=True)
        with publish_file(folder / f"step_{report.step:06d}.json", replace=True) as path:
            path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def _text(self, tokens: list[int]) -> str | None:
        return None if self.tokenizer is None else str(self.tokenizer.decode(tokens))
