"""When mixture weights move during a run: once per optimizer step it is asked, at some steps it acts.

Disabled, it touches neither model nor random numbers nor weights: the run is the static mixture to the bit. A
scoring that fails, for whatever reason, costs a warning: the run goes on with the old weights. With
`torch.distributed` every rank scores, and all take rank 0's weights, so they stay equal to the bit. All state
is plain numbers that json gives back exactly.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from data_handler.influence.config import TrackerConfig
from data_handler.influence.reweight import MixtureWeightCalculator, WeightUpdate
from durable import UserError

logger = logging.getLogger(__name__)

ScoreSources = Callable[[], Mapping[str, Tensor]]
"""Source → scores [m] of some of its examples at the model as it is now, higher is better."""


class Reweightable(Protocol):
    """What follows the weights, such as `data_handler.MixtureSchedule`."""

    def reweight(self, n: int, weights: dict[str, float], /) -> object: ...


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One update: after which optimizer step and sample, and what was decided."""

    step: int
    sample: int
    update: WeightUpdate

    def to_dict(self) -> dict[str, Any]:
        return {"step": self.step, "sample": self.sample, **self.update.to_dict()}


class InfluenceTracker:
    """Asks for scores when they are due, moves the weights, and remembers."""

    def __init__(
        self,
        config: TrackerConfig,
        weights: Mapping[str, float],
        score_sources: ScoreSources,
        schedule: Reweightable | None = None,
    ) -> None:
        self.config = config
        self.calculator = MixtureWeightCalculator(weights, config.mixture)
        self.weights = dict(self.calculator.base)
        self.last_step = 0
        self._score_sources = score_sources
        self._schedule = schedule
        self._history: list[HistoryEntry] = []

    @property
    def is_enabled(self) -> bool:
        return self.config.enabled

    def get_weight_history(self) -> list[dict[str, Any]]:
        """Every update so far, also those that kept the old weights."""
        return [entry.to_dict() for entry in self._history]

    def on_step_end(self, step: int, sample: int) -> WeightUpdate | None:
        """Call after optimizer step `step` (from 1), when `sample` samples were used; twice is once.

        The mixture decides from which sample on new weights count (the next window).
        """
        if not self.is_enabled or step <= self.last_step:
            return None
        self.last_step = step
        if step < self.config.warmup_steps or step % self.config.update_interval:
            return None
        update = _same_on_all_ranks(self._update())
        if update.kept_because is None:
            update = self._apply(update, sample)
        self._history.append(HistoryEntry(step, sample, update))
        return update

    def _apply(self, update: WeightUpdate, sample: int) -> WeightUpdate:
        if self._schedule is not None:
            try:
                self._schedule.reweight(sample, dict(update.weights))
            except UserError as error:  # such as a weight too small for one sample in a window
                return self.calculator.keep(self.weights, f"the mixture refuses the new ones: {error}")
        self.weights = dict(update.weights)
        return update

    def _update(self) -> WeightUpdate:
        try:
            scores = self._score_sources()
        except Exception as error:  # a run of days does not end because a side measurement did
            logger.debug("influence scoring failed", exc_info=True)
            return self.calculator.keep(self.weights, f"scoring failed with {type(error).__name__}: {error}")
        rate = self.config.learning_rate
        return self.calculator.compute_mixture_weights(self.weights, scores, learning_rate=rate)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for json."""
        return {
            "last_step": self.last_step,
            "weights": dict(self.weights),
            "calculator": self.calculator.state_dict(),
            "history": self.get_weight_history(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.calculator.load_state_dict(state["calculator"])
        self.last_step = int(state["last_step"])
        self.weights = dict(state["weights"])
        self._history = [
            HistoryEntry(
                entry["step"],
                entry["sample"],
                WeightUpdate(dict(entry["weights"]), dict(entry["advantages"]), entry["kept_because"]),
            )
            for entry in state["history"]
        ]


def _same_on_all_ranks(update: WeightUpdate) -> WeightUpdate:
    """Rank 0's decision; a collective, so every rank gets here whether its own scoring failed or not."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return update
    box: list[WeightUpdate] = [update]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
