"""`gpu=NAME`: the micro-batch that fits there, and as many of them as a step of 64 blocks needs."""

from collections.abc import Collection
from typing import Any

from durable import UserError
from wrinklefree.config.schema import SEQUENCES_PER_STEP, Stage

BATCH_SIZE = "training.batch_size"
ACCUMULATION = "training.gradient_accumulation_steps"
ALONE = (Stage.base, Stage.stage1, Stage.stage2)
"""Stages that hold no teacher beside the student."""


def fit_to_gpu(config: Any, written: Collection[str]) -> None:
    """Set both sizes of a composed configuration, except for those that a person wrote."""
    table = config.gpu.micro_batches
    if not table or {BATCH_SIZE, ACCUMULATION} <= set(written):
        return
    if BATCH_SIZE not in written:
        model = config.model.name
        if model not in table:
            raise UserError(
                f"gpu: {config.gpu.name} has no batch for this model",
                model,
                f"set {BATCH_SIZE} and {ACCUMULATION}",
                choices=table,
            )
        which = "alone" if config.training.stage in ALONE else "with_teacher"
        config.training.batch_size = table[model][which]
    if ACCUMULATION not in written:
        config.training.gradient_accumulation_steps = max(1, SEQUENCES_PER_STEP // config.training.batch_size)
