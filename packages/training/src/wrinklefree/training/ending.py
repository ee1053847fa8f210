"""When a run is over: a function of what every checkpoint holds, asked at its end and at its start."""

from collections.abc import Mapping
from typing import Any

from wrinklefree.config.schema import RunConfig
from wrinklefree.lightning.callbacks.early_stopping import plateau


def why_over(config: RunConfig, parts: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why no step is left to do; none when there is one. `parts` are the states of a checkpoint."""
    progress = parts["progress"]
    if progress["step"] >= config.max_steps:
        return f"{progress['step']} steps"
    if tokens_are_used_up(config, progress["num_tokens"]):
        return f"{progress['num_tokens']:,} of {config.training.total_tokens:,} tokens"
    return plateau(parts.get("early_stopping"), config.training.early_stopping)


def tokens_are_used_up(config: RunConfig, num_tokens: int) -> bool:
    """Whether a run whose length is given in tokens has read them."""
    return config.training.max_steps is None and num_tokens >= config.training.total_tokens
