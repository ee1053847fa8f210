"""What an objective is: a sum over the tokens it is about, how many these are, and what it needs for that.

Objectives return sums, never means. The trainer divides by the count of the whole optimizer step, over all
micro-batches and ranks, which `count` tells from labels alone before any forward. So the gradient does not
depend on how the step was cut into micro-batches.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bitnet_arch import ModelWalk
from data_handler import Batch
from durable import UserError
from wrinklefree.objectives.states import States


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What has to be computed before an objective can be."""

    teacher_logits: bool = False
    masked_views: bool = False
    hidden_states: bool = False
    """What every decoder layer gives to the next, of student and teacher."""
    relations: frozenset[int] = frozenset()
    """Layers whose queries, keys and values are compared with the teacher's; negative ones from the end."""

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            teacher_logits=self.teacher_logits or other.teacher_logits,
            masked_views=self.masked_views or other.masked_views,
            hidden_states=self.hidden_states or other.hidden_states,
            relations=self.relations | other.relations,
        )

    @property
    def teacher(self) -> bool:
        """Does anything here come from a teacher?"""
        return self.teacher_logits or self.needs_inside

    @property
    def needs_inside(self) -> bool:
        """Does anything come from inside the teacher? Then it has to run here."""
        return self.hidden_states or bool(self.relations)


@dataclass(frozen=True, slots=True)
class LossSum:
    """A loss before it is divided: summed over tokens, and over how many."""

    total: Tensor
    count: Tensor | int

    def mean(self) -> Tensor:
        """0 where there was nothing to sum, and still part of the graph."""
        return divided(self.total, self.count)


def divided(total: Tensor, count: Tensor | int | float) -> Tensor:
    """total / count; a count of 0 leaves zero times the total, so that `backward` works and NaN stays NaN."""
    return total / count if float(count) else total * 0


class Objective(ABC):
    """One term of the loss."""

    name: ClassVar[str]

    def needs(self) -> Needs:
        """Nothing but the student, unless an objective says otherwise."""
        return Needs()

    def check_models(self, student: ModelWalk, teacher: ModelWalk) -> None:  # noqa: B027 - most fit any two
        """UserError where these two cannot be compared: before a run begins."""

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """How many tokens the sum runs over: from labels alone, so it is known before any forward."""

    @abstractmethod
    def __call__(self, states: States, batch: Batch) -> LossSum:
        """The sum, and over how many tokens; zero with a graph where there are none."""


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig:
    """What can be set about every objective. Each has a subclass beside it."""

    name: ClassVar[str] = "objective"

    enabled: bool = True
    """Off is the same as a weight of 0."""
    weight: float = 1.0
    """Factor of the mean over the objective's tokens. With 0 it is not computed, and costs nothing."""

    def __post_init__(self) -> None:
        check_common(self.name, enabled=self.enabled, weight=self.weight)


def check_common(name: str, *, enabled: object, weight: object) -> None:
    """What all objectives have in common."""
    require(isinstance(enabled, bool), f"objectives.{name}.enabled", "must be true or false", enabled)
    check_weight(f"objectives.{name}.weight", weight)


def check_weight(key: str, weight: object) -> None:
    """A weight is a finite number from 0 on."""
    require(is_number(weight, at_least=0), key, "must be a number, 0 or more", weight)


def is_number(value: object, *, at_least: float = -math.inf) -> bool:
    """A finite number that is no yes or no."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value >= at_least
    )


def is_count(value: object, *, at_least: int) -> bool:
    """A whole number."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def require(holds: bool, key: str, problem: str, found: object) -> None:
    """Refuse what a person set, in one line."""
    if not holds:
        raise UserError(f"{key}: {problem}", found=str(found), fix=f"change {key}")
