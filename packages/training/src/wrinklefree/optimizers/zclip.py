"""Gradient clipping: a fixed norm, and ZClip (arXiv 2504.02507), which limits norms that stand out.

Mean μ and standard deviation σ run over the norms of the steps before (start: the first `warmup_steps`). With
z = (g - μ) / σ, a norm beyond z_threshold is clipped to μ + z_threshold²·σ / z, so that the larger a spike,
the less of it passes; μ and σ then take in the clipped norm, not the spike. Statistics are plain numbers, so
one norm per step crosses to the host, and equal norms on all ranks give equal limits.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, assert_never

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from wrinklefree.optimizers.config import GradientClippingConfig, ZClipConfig, ZClipMode

EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class NormStatistics:
    """What ZClip knows about earlier norms."""

    mean: float = 0.0
    variance: float = 0.0
    warmup: tuple[float, ...] = ()
    """Norms so far, until there are enough to start from; empty afterwards."""
    is_warm: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Clipped:
    """What happened to the gradients of one step."""

    norm: float
    """Before clipping."""
    limit: float
    """Infinite when nothing limits it."""
    z_score: float
    """0 during warm-up and without ZClip."""

    @property
    def was_clipped(self) -> bool:
        return self.norm > self.limit


def after_norm(
    statistics: NormStatistics, norm: float, config: ZClipConfig
) -> tuple[NormStatistics, float, float]:
    """Statistics with this norm in them, the limit that it must keep (infinite: none), and its z-score.

    A norm that is no finite number changes nothing.
    """
    if not math.isfinite(norm):
        return statistics, math.inf, 0.0
    if not statistics.is_warm:
        return _warmed(statistics, norm, config), math.inf, 0.0
    z = (norm - statistics.mean) / (math.sqrt(statistics.variance) + EPS)
    limit = _limit(statistics, norm, z, config)
    if norm > limit and config.skip_update_on_spike:
        return statistics, limit, z
    decay, seen = config.ema_decay, min(norm, limit)
    mean = decay * statistics.mean + (1 - decay) * seen
    variance = decay * statistics.variance + (1 - decay) * (seen - mean) ** 2
    return replace(statistics, mean=mean, variance=variance), limit, z


def total_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Norm of all gradients together, on their device."""
    return get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


class ZClip:
    """Clips gradients by the fixed norm, by ZClip, or by both: the smaller limit holds."""

    def __init__(self, config: GradientClippingConfig) -> None:
        self.config = config
        self.statistics = NormStatistics()

    def observe(self, norm: float) -> Clipped:
        """Take in the norm of a step and say what limit it must keep."""
        limit, z = math.inf, 0.0
        if self.config.zclip.enabled:
            self.statistics, limit, z = after_norm(self.statistics, norm, self.config.zclip)
        if self.config.max_norm is not None:
            limit = min(limit, self.config.max_norm)
        return Clipped(norm=norm, limit=limit, z_score=z)

    def clip(self, parameters: Iterable[Tensor], norm: Tensor | float | None = None) -> Clipped:
        """Scale the gradients down to the limit. Pass the norm when it is known; a tensor is read once."""
        parameters = list(parameters)
        clipped = self.observe(float(total_norm(parameters) if norm is None else norm))
        if clipped.was_clipped and math.isfinite(clipped.norm):
            clip_grads_with_norm_(parameters, clipped.limit, torch.tensor(clipped.norm))
        return clipped

    def state_dict(self) -> dict[str, Any]:
        """Numbers as json takes them."""
        now = self.statistics
        return {
            "mean": now.mean,
            "variance": now.variance,
            "warmup": list(now.warmup),
            "is_warm": now.is_warm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.statistics = NormStatistics(**{**state, "warmup": tuple(state["warmup"])})


def _warmed(statistics: NormStatistics, norm: float, config: ZClipConfig) -> NormStatistics:
    norms = (*statistics.warmup, norm)
    if len(norms) < config.warmup_steps:
        return replace(statistics, warmup=norms)
    mean = sum(norms) / len(norms)
    variance = sum((each - mean) ** 2 for each in norms) / len(norms)
    return NormStatistics(mean=mean, variance=variance, is_warm=True)


def _limit(statistics: NormStatistics, norm: float, z: float, config: ZClipConfig) -> float:
    mean, spread = statistics.mean, config.z_threshold * math.sqrt(statistics.variance)
    match config.mode:
        case ZClipMode.percentile:
            limit, is_spike = mean + spread, norm > mean + spread
        case ZClipMode.adaptive:
            is_spike = z > config.z_threshold
            limit = (mean + spread * config.z_threshold / z) * config.clip_factor if is_spike else math.inf
        case ZClipMode.mean:
            limit, is_spike = mean, z > config.z_threshold
        case _:
            assert_never(config.mode)
    return max(limit, config.min_limit) if is_spike else math.inf
