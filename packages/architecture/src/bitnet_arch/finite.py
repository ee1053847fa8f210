"""Refuse tensors that must never be quantised or written: NaN, Inf, and tensors without data, named one by
one.

The forward lets NaN pass, so that a trainer sees it. Conversion and saving are where it has to stop.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from durable import ExitCode, UserError

NAMED = 3
"""How many offenders a message names."""


def refuse_unusable_tensors(tensors: Mapping[str, Tensor], *, action: str) -> None:
    """Raise when a parameter or a buffer of the model is not finite or has no data. `action` is the verb of
    the message.
    """
    _refuse([name for name, t in tensors.items() if t.is_meta], action, "on the meta device, without data")
    _refuse([name for name, t in tensors.items() if _is_broken(t)], action, "NaN or Inf")


def _is_broken(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach()).all())


def _refuse(names: list[str], action: str, found: str) -> None:
    if not names:
        return
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    raise UserError(
        f"Cannot {action} this model: {', '.join(names[:NAMED])}{more}",
        found=found,
        fix="load the weights again, from a checkpoint whose tensors are all there and finite",
        exit_code=ExitCode.BAD_DATA,
    )
