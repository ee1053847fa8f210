"""What a run says about one of its checkpoints: steps, tokens, losses. For a model card."""

import math
from dataclasses import dataclass
from pathlib import Path

from bitnet_serving.checkpoint_source import CHECKPOINTS, run_fingerprint
from durable import read_manifest
from durable.metrics import read_metrics

HEADER = "\n## Training\n\n| | |\n|---|---|\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunNumbers:
    """Those of one checkpoint; what a run did not write down is None or empty."""

    step: int
    stage: str | None
    tokens: int | None
    loss: float | None
    """Of the last step, all objectives together."""
    validation: dict[str, float]
    """Source → next-token loss at full quantisation, if it was measured so."""
    validation_step: int | None
    fingerprint: str | None

    def to_markdown(self) -> str:
        """A section of a model card."""
        rows = [("stage", self.stage), ("optimizer steps", f"{self.step:,}")]
        if self.tokens is not None:
            rows.append(("tokens", f"{self.tokens:,}"))
        if self.loss is not None:
            rows.append(("loss of the last step, all objectives", f"{self.loss:.4f}"))
        if self.validation:
            mean = sum(self.validation.values()) / len(self.validation)
            when = "" if self.validation_step == self.step else f", after step {self.validation_step:,}"
            rows.append((f"validation loss (perplexity){when}", _loss(mean)))
            rows += [(f"… on {source}", _loss(loss)) for source, loss in self.validation.items()]
        if self.fingerprint is not None:
            rows.append(("fingerprint of the run", f"`{self.fingerprint}`"))
        return HEADER + "".join(f"| {name} | {value} |\n" for name, value in rows if value is not None)


def read_run_numbers(checkpoint: Path) -> RunNumbers | None:
    """Of a checkpoint that still lies in its run; None for any other directory."""
    metadata = read_manifest(checkpoint).metadata
    step, stage = metadata.get("step"), metadata.get("stage")
    metrics = checkpoint.resolve().parents[1] / "metrics.jsonl"
    if checkpoint.resolve().parent.name != CHECKPOINTS or not isinstance(step, int) or not metrics.is_file():
        return None
    steps = [row for row in read_metrics(metrics) if row["step"] == step]
    last = steps[-1] if steps else {}
    validations = [row for row in read_metrics(metrics, kind="val") if row["step"] <= step]
    # What was measured before a resume is followed by what was measured after it.
    validation = validations[-1] if validations else {"losses": {}, "step": None}
    losses = validation["losses"]
    return RunNumbers(
        step=step,
        stage=stage if isinstance(stage, str) else None,
        tokens=last.get("tokens"),
        loss=last.get("loss"),
        validation=losses.get("at 1") or losses.get("now") or {},
        validation_step=validation["step"],
        fingerprint=run_fingerprint(checkpoint),
    )


def _loss(value: float) -> str:
    return f"{value:.4f} ({math.exp(min(value, 700)):.4g})"
