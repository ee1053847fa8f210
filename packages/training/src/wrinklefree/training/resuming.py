"""May this configuration go on from that checkpoint? Whatever changes the numbers of a run must be the same.

A person who means a change names it in `training.resume.allow`. More steps are always welcome; batch size,
accumulation and ranks may change as long as an optimizer step sees the same samples.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from durable import UserError

logger = logging.getLogger(__name__)

FREE = (
    "output_dir",
    "experiment_name",
    "data.directory",
    "data.num_workers",
    "distributed",
    "gpu",
    "gcs",
    "training.output_dir",
    "training.max_steps",
    "training.total_tokens",
    "training.batch_size",
    "training.auto_batch_size",
    "training.gradient_accumulation_steps",
    "training.resume",
    "training.stage1",
    "training.teacher.base_url",
    "training.teacher.api_key_env",
    "training.teacher.timeout_seconds",
    "training.checkpoint",
    "training.validation",
    "training.early_stopping",
    "training.samples",
    "training.non_finite",
    "training.logging",
)
"""Keys that change no loss and no weight, and those whose product `require_same_run` looks at."""


def require_same_run(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    saved_sizes: Mapping[str, int],
    sizes: Mapping[str, int],
    allow: list[str],
) -> None:
    """UserError (exit code 2) that lists what differs. `sizes` are max_steps and samples of a step."""
    changes = [
        f"{key} {before!r} → {after!r}"
        for key, before, after in differences(saved, now)
        if not _is_below(key, FREE) and not _is_below(key, allow)
    ]
    if saved_sizes["samples_per_step"] != sizes["samples_per_step"] and not _is_below(
        "training.batch_size", allow
    ):
        changes.append(
            "samples of a step (batch_size × gradient_accumulation_steps × ranks) "
            f"{saved_sizes['samples_per_step']} → {sizes['samples_per_step']}"
        )
    if sizes["max_steps"] < saved_sizes["max_steps"] and not _is_below("training.max_steps", allow):
        changes.append(
            f"training.max_steps {saved_sizes['max_steps']} → {sizes['max_steps']}, which is fewer"
        )
    if changes:
        raise UserError(
            f"resume: the configuration differs from the checkpoint's in {len(changes)} keys",
            "; ".join(changes),
            "restore them, name them in training.resume.allow, or start another experiment_name",
        )
    if sizes["max_steps"] > saved_sizes["max_steps"]:
        logger.info("max_steps was %d and is %d now", saved_sizes["max_steps"], sizes["max_steps"])


def require_same_data(
    saved: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]], *, allow: list[str]
) -> None:
    """UserError (exit code 2) that names the sources whose documents or tokenizer are others now."""
    changes = [
        f"{name} ({', '.join(what for what in before if before[what] != now[name][what])})"
        for name, before in saved.items()
        if name in now and before != now[name] and not _is_below(f"data.sources.{name}", allow)
    ]
    if changes:
        raise UserError(
            "resume: the prepared data is not what the checkpoint was trained on",
            "; ".join(changes),
            "bring the documents back, name data.sources in training.resume.allow, "
            "or start another experiment_name",
        )


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, saved, now) of every leaf that differs; a key that one side lacks counts as None."""
    before, after = dict(_leaves(saved)), dict(_leaves(now))
    return [
        (key, before.get(key), after.get(key))
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_below(key: str, prefixes: tuple[str, ...] | list[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
