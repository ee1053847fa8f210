"""Mixture weights that follow influence: the sources that help the probes get more, within bounds.

    scores of m examples per source ─► advantage: how far the source lies above the mixture,
                                       less its noise, in standard deviations within a source
                                  ─► running average
                                  ─► target = projection(start + strength · average) on the bounded simplex
                                  ─► weights + learning rate · (target − weights)

The target starts from the weights that the run started with, not from the last ones: where no source is
better, the advantage is 0 and the weights come back, instead of walking at random into a corner. Floors keep
every source measurable. An update that cannot be trusted (not finite, a source without scores, no spread,
everything to one source) keeps the old weights and says why.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from data_handler.influence.config import MixtureOptimizationConfig
from data_handler.influence.simplex import Floats, project_to_bounded_simplex

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """One decision: the weights from here on, and what they rest on."""

    weights: dict[str, float]
    advantages: dict[str, float]
    """Of this update alone; empty when the scores could not be used."""
    kept_because: str | None = None
    """Why the weights are the old ones; none when they are new."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def advantages(
    scores: Mapping[str, Floats], weights: Mapping[str, float], *, noise: float
) -> dict[str, float]:
    """Source → how far its mean score is from the mixture's, beyond `noise` standard errors.

    In standard deviations, pooled over the sources, so the unit of the scores does not matter.
    """
    means = {name: float(values.mean()) for name, values in scores.items()}
    pooled = float(np.sqrt(np.mean([values.var(ddof=1) for values in scores.values()])))
    middle = sum(weights[name] * means[name] for name in scores) / sum(weights[name] for name in scores)
    result = {}
    for name, values in scores.items():
        distance = means[name] - middle
        error = pooled / np.sqrt(values.size)
        result[name] = float(np.sign(distance) * max(0.0, abs(distance) - noise * error)) / pooled
    return result


class MixtureWeightCalculator:
    """Turns scores into weights; holds the starting weights and the running averages."""

    def __init__(self, base: Mapping[str, float], config: MixtureOptimizationConfig | None = None) -> None:
        self.config = config or MixtureOptimizationConfig()
        total = sum(base.values())
        if not (total > 0 and min(base.values()) >= 0):
            raise ValueError(f"Mixture weights must be 0 or more with a sum above 0, got {dict(base)}.")
        self.base = {name: weight / total for name, weight in base.items()}
        self._averages = dict.fromkeys(self._active, 0.0)
        self._num_updates = 0
        if len(self._active) > 1:
            self._target({})  # bounds that nothing fits between are an error now, not in step 1,000

    @property
    def _active(self) -> list[str]:
        """Sources that the run opened; one of weight 0 never was."""
        return [name for name, weight in self.base.items() if weight > 0]

    def compute_mixture_weights(
        self, current: Mapping[str, float], scores: Mapping[str, Tensor], *, learning_rate: float = 1.0
    ) -> WeightUpdate:
        """The next weights, from scores [m] of examples of every source (higher is better)."""
        values = {name: score.detach().double().cpu().numpy() for name, score in scores.items()}
        if reason := self._reason_to_keep(values):
            return self.keep(current, reason)
        gained = advantages({name: values[name] for name in self._active}, current, noise=self.config.noise)
        smoothing = self.config.influence_smoothing if self._num_updates else 1.0
        averages = {name: old + smoothing * (gained[name] - old) for name, old in self._averages.items()}
        target = self._target(averages)
        if max(target.values()) >= 1.0:
            return self.keep(current, f"{max(target, key=lambda name: target[name])} would get everything")
        self._averages = averages
        self._num_updates += 1
        return WeightUpdate(self._towards(current, target, learning_rate), gained)

    def keep(self, current: Mapping[str, float], reason: str) -> WeightUpdate:
        """The old weights, with a warning that says why."""
        logger.warning("influence: mixture weights stay as they are: %s.", reason)
        return WeightUpdate(dict(current), {}, reason)

    def _reason_to_keep(self, scores: Mapping[str, Floats]) -> str | None:
        if len(self._active) < 2:
            return "there is one source only"
        for name in self._active:
            if name not in scores:
                return f"no scores for {name}"
            if scores[name].size < 2:
                return f"fewer than two scores for {name}"
            if not np.isfinite(scores[name]).all():
                return f"scores of {name} are not finite"
        if all(scores[name].var() == 0 for name in self._active):
            return "all scores within a source are the same"
        return None

    def _target(self, averages: Mapping[str, float]) -> dict[str, float]:
        names, strength = self._active, self.config.strength
        point = np.array([self.base[name] + strength * averages.get(name, 0.0) for name in names])
        projected = project_to_bounded_simplex(point, self.config.min_weight, self.config.max_weight)
        return dict(zip(names, projected.tolist(), strict=True))

    def _towards(
        self, current: Mapping[str, float], target: Mapping[str, float], rate: float
    ) -> dict[str, float]:
        names: Sequence[str] = self._active
        point = np.array([(1 - rate) * current[name] + rate * target[name] for name in names])
        # Changes nothing between two points of the simplex; brings weights inside that started outside.
        inside = project_to_bounded_simplex(point, self.config.min_weight, self.config.max_weight)
        return dict.fromkeys(self.base, 0.0) | dict(zip(names, inside.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for json."""
        return {"base": dict(self.base), "averages": dict(self._averages), "num_updates": self._num_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state["base"]) != set(self.base):
            raise ValueError(
                f"Saved weights are for {sorted(state['base'])}, this run mixes {sorted(self.base)}."
            )
        self.base = dict(state["base"])
        self._averages = dict(state["averages"])
        self._num_updates = int(state["num_updates"])
