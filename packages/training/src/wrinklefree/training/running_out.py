"""Memory and disk that run out: said in one line, with the numbers and the keys to change."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from durable import UserError
from wrinklefree.config import RunConfig
from wrinklefree.terminal import megabytes
from wrinklefree.training.batch_size import available_memory

logger = logging.getLogger(__name__)
STATE_PER_WEIGHT = 2
"""Tensors as large as the weights in an optimizer state: AdamW's moments, the most of all of ours."""


@contextmanager
def memory_explained(config: RunConfig) -> Iterator[None]:
    """Turn an allocation that fails into a UserError; other errors travel."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_about_memory(error):
            raise
        training = config.training
        free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else available_memory()
        raise UserError(
            "training.batch_size: this device is out of memory",
            f"{training.batch_size} × {training.max_seq_length} tokens, {megabytes(free)} free",
            "lower training.batch_size and raise training.gradient_accumulation_steps by as much, or lower "
            "training.max_seq_length; `--dry-run` tells what a step takes",
        ) from error


def warn_about_room(directory: Path, model: nn.Module) -> None:
    """Say so when less than two checkpoints fit: the newest is written before an old one goes."""
    needed = (1 + STATE_PER_WEIGHT) * sum(parameter.nbytes for parameter in model.parameters())
    free = shutil.disk_usage(directory).free
    if free < 2 * needed:
        logger.warning(
            "output_dir: %s has %s free, and a checkpoint takes about %s; two at a time have to fit",
            directory,
            megabytes(free),
            megabytes(needed),
        )


def _is_about_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text
