"""Weights of objectives that change over a run: phases, each up to a share of the steps.

    step            ▔▔▔▔▁▁▁▁   the weights of a phase hold from its first step to its last
    linear, cosine  ▔▔▔▔╲__    the first phase holds its weights; each later one reaches its own at its end

Weights are a function of the step alone, so a resume needs nothing else. An objective that a phase does not
name has weight 0 there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from durable import UserError
from wrinklefree.objectives.base import check_weight, is_number

KEY = "training.curriculum"


class Interpolation(StrEnum):
    """How weights go from one phase to the next."""

    step = "step"
    linear = "linear"
    cosine = "cosine"


@dataclass(kw_only=True)
class PhaseConfig:
    """A part of a curriculum."""

    name: str = ""
    until: float = 1.0
    """Share of the run's steps at which it ends; a first phase until 0 is where the others start from."""
    objectives: dict[str, float] = field(default_factory=dict)
    """Name → weight; an objective that is not named has weight 0."""
    data: str | None = None
    """A data config from here on; none stays with the one before."""


@dataclass(kw_only=True)
class CurriculumConfig:
    """Weights of objectives that change over the run, instead of those in `training.objectives`."""

    enabled: bool = False
    interpolation: Interpolation = Interpolation.step
    phases: list[PhaseConfig] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CurriculumPhase:
    """A part of a run."""

    name: str
    end_ratio: float
    """Share of the run's steps at which it ends."""
    objective_weights: Mapping[str, float]
    data_config: str | None = None


class CurriculumScheduler:
    """The weights of every step of a run."""

    def __init__(
        self,
        phases: Sequence[CurriculumPhase],
        total_steps: int,
        interpolation: Interpolation | str = Interpolation.linear,
    ) -> None:
        """UserError for phases that are no whole run, or in which nothing would be trained."""
        _check(phases)
        self.phases = tuple(phases)
        self.total_steps = max(1, total_steps)
        self.interpolation = Interpolation(interpolation)
        self.names = tuple(dict.fromkeys(name for phase in phases for name in phase.objective_weights))

    def phase(self, step: int) -> CurriculumPhase:
        """Of a step, from 1; the one that ends with it where two meet."""
        return self.phases[self._place(step)]

    def weights(self, step: int) -> dict[str, float]:
        """Of a step, from 1."""
        place = self._place(step)
        now = self._of(place)
        if place == 0 or self.interpolation is Interpolation.step:
            return now
        before = self._of(place - 1)
        start, end = self.phases[place - 1].end_ratio, self.phases[place].end_ratio
        share = (step / self.total_steps - start) / (end - start)
        if self.interpolation is Interpolation.cosine:
            share = (1 - math.cos(math.pi * share)) / 2
        return {name: before[name] + (now[name] - before[name]) * share for name in self.names}

    def data_config(self, step: int) -> str | None:
        """The data config of this step; none where no phase up to it named one."""
        named = [phase.data_config for phase in self.phases[: self._place(step) + 1] if phase.data_config]
        return named[-1] if named else None

    def coming(self, step: int) -> set[str]:
        """Objectives with a weight above 0 in this step or a later one."""
        later = [self._of(place) for place in range(self._place(step), len(self.phases))]
        return {name for weights in (self.weights(step), *later) for name in weights if weights[name] > 0}

    def _place(self, step: int) -> int:
        reached = min(step / self.total_steps, 1.0)
        return next(place for place, phase in enumerate(self.phases) if reached <= phase.end_ratio)

    def _of(self, place: int) -> dict[str, float]:
        given = self.phases[place].objective_weights
        return {name: float(given.get(name, 0.0)) for name in self.names}


def _check(phases: Sequence[CurriculumPhase]) -> None:
    if not phases:
        raise UserError(f"{KEY}.phases: there are none", fix=f"name some, or set {KEY}.enabled=false")
    ends = [phase.end_ratio for phase in phases]
    if not all(is_number(end, at_least=0) for end in ends) or ends[-1] != 1 or not _ascends(ends):
        found = ", ".join(map(str, ends))
        raise UserError(f"{KEY}.phases: `until` must ascend, and end at 1", found, "give shares of the run")
    for phase in phases:
        for name, weight in phase.objective_weights.items():
            check_weight(f"{KEY}: {phase.name}: {name}", weight)
        if not any(phase.objective_weights.values()):
            found = ", ".join(phase.objective_weights) or "no objective"
            raise UserError(f"{KEY}: {phase.name}: nothing would be trained", found, "give a weight above 0")


def _ascends(numbers: Sequence[float]) -> bool:
    return all(first < second for first, second in pairwise(numbers))
