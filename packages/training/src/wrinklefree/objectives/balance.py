"""How strongly each objective pulls at the weights, and factors that make the pulls as they were meant.

The norm of an objective's gradient is that of its mean (sum / count), before any weight. Losses that are
normalised in different ways differ by orders of magnitude: BitDistill's γ = 1e5 belongs to one that divides
twice (arXiv 2510.13998 and its code), and is 1,700 times cross entropy without that.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from data_handler import Batch
from wrinklefree.objectives.base import divided, require
from wrinklefree.objectives.manager import ObjectiveManager
from wrinklefree.teachers.base import Teacher

REFERENCE = "continue_pretrain"
"""What others are compared with, where it is active; else the first that is."""
TOO_STRONG = 10.0
"""Times the reference's pull."""
KEPT = 0.5
"""Of an earlier factor, at each measurement."""
LARGEST_FACTOR = 100.0
"""A student that still is its teacher has next to no gradient there, which says nothing of later steps."""


class BalanceMode(StrEnum):
    """What is done with the measured norms."""

    none = "none"
    gradnorm = "gradnorm"


@dataclass(kw_only=True)
class BalanceConfig:
    """Gradient norms of the objectives, beside cross entropy's."""

    mode: BalanceMode = BalanceMode.none
    """`gradnorm` rescales every objective so that weights mean shares of gradient; `none` only measures."""
    interval: int | None = 100
    """Optimizer steps between measurements, each a forward and a backward pass per objective; none: never."""
    warn_steps: int = 50
    """After so many steps beyond 10 × cross entropy a term is named in a warning."""

    def __post_init__(self) -> None:
        key, interval = "training.balance", self.interval
        require(interval is None or interval >= 1, f"{key}.interval", "must be 1 or more", interval)
        require(self.warn_steps >= 1, f"{key}.warn_steps", "must be 1 or more", self.warn_steps)
        needs = self.mode == BalanceMode.none or interval is not None
        require(needs, f"{key}.interval", "is needed for mode: gradnorm", interval)


def gradient_norms(
    manager: ObjectiveManager, student: nn.Module, teacher: Teacher | None, batch: Batch
) -> dict[str, float]:
    """Active objective → norm of the gradient of its mean over this batch; gradients in place stay."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    losses = manager.losses(student, teacher, batch)
    norms = {}
    for number, (name, loss) in enumerate(losses.items(), start=1):
        mean = divided(loss.total, loss.count)
        norms[name] = _gradient_norm(mean, parameters, retain_graph=number < len(losses))
    return norms


def _gradient_norm(loss: Tensor, parameters: list[nn.Parameter], *, retain_graph: bool) -> float:
    """A function, so that one objective's gradients are gone before the next one's come."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=retain_graph)
    return float(nn.utils.get_total_norm([each for each in found if each is not None]))


def reference_of(norms: Mapping[str, float]) -> str:
    """Whose pull is 1."""
    return REFERENCE if REFERENCE in norms else next(iter(norms))


def balanced_scales(norms: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """Objective → factor that makes its pull the reference's, moved half the way from the factor before."""
    unit = norms[reference_of(norms)]
    scales = dict(before)
    for name, norm in norms.items():
        if 0 < norm < math.inf and 0 < unit < math.inf:
            wanted = min(unit / norm, LARGEST_FACTOR)
            scales[name] = wanted if name not in before else KEPT * before[name] + (1 - KEPT) * wanted
    return scales
