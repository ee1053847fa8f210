"""What a user may set about influence: which layers, how gradients are kept, how weights may move."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from durable import UserError

Choice = TypeVar("Choice", bound=StrEnum)


class InfluenceTarget(StrEnum):
    """The layers whose weight gradients describe an example."""

    EMBEDDING = "embedding"
    OUTPUT = "output"
    EMBEDDING_AND_OUTPUT = "both"
    HIDDEN = "hidden"
    """Every linear layer but the output."""
    ALL = "all"


class InfluenceMethod(StrEnum):
    """How two gradients become a score."""

    DATAINF = "datainf"
    GRADIENT_DOT = "gradient_dot"
    """The limit of DataInf for large damping, times that damping."""


@dataclass(kw_only=True, slots=True)
class InfluenceConfig:
    """How examples are scored."""

    method: InfluenceMethod = InfluenceMethod.DATAINF
    target_layers: InfluenceTarget = InfluenceTarget.ALL
    projection_dim: int | None = 256
    """Numbers kept per weight and example; none keeps whole gradients (tiny models only)."""
    damping: float = 1.0
    """λ of DataInf in each layer, in units of the mean squared gradient norm there."""
    batch_size: int = 8
    """Examples per backward pass; halved when memory runs out."""
    seed: int = 42
    """Of the projection."""

    def __post_init__(self) -> None:
        self.method = choice(InfluenceMethod, self.method, "influence.method")
        self.target_layers = choice(InfluenceTarget, self.target_layers, "influence.target_layers")
        _require(self.damping > 0, "influence.damping", "must be above 0", self.damping)
        _require(self.batch_size >= 1, "influence.batch_size", "must be 1 or more", self.batch_size)
        if self.projection_dim is not None:
            _require(
                self.projection_dim >= 1, "influence.projection_dim", "must be 1 or more", self.projection_dim
            )


@dataclass(kw_only=True, slots=True)
class MixtureOptimizationConfig:
    """How mixture weights follow scores."""

    min_weight: float = 0.05
    """Floor of every source whose weight is not 0; a source of weight 0 stays out."""
    max_weight: float = 0.60
    strength: float = 0.5
    """Weight gained for an advantage of one standard deviation of the scores within a source."""
    noise: float = 2.0
    """Standard errors by which a source must differ from the mixture before its weight moves at all."""
    influence_smoothing: float = 0.5
    """Share of the newest scores in the running average; 1 forgets the past."""

    def __post_init__(self) -> None:
        key = "influence.mixture"
        ordered = 0 <= self.min_weight <= self.max_weight <= 1
        bounds = (self.min_weight, self.max_weight)
        _require(ordered, f"{key}.min_weight", "needs 0 ≤ min_weight ≤ max_weight ≤ 1", bounds)
        _require(self.strength > 0, f"{key}.strength", "must be above 0", self.strength)
        _require(self.noise >= 0, f"{key}.noise", "must be 0 or more", self.noise)
        in_range = 0 < self.influence_smoothing <= 1
        _require(
            in_range, f"{key}.influence_smoothing", "must be above 0 and at most 1", self.influence_smoothing
        )


@dataclass(kw_only=True, slots=True)
class TrackerConfig:
    """When weights move during a run."""

    enabled: bool = False
    update_interval: int = 1000
    """Optimizer steps between updates."""
    warmup_steps: int = 500
    """No update before this optimizer step."""
    learning_rate: float = 0.2
    """Share of the way from the present weights to the proposed ones."""
    mixture: MixtureOptimizationConfig = field(default_factory=MixtureOptimizationConfig)

    def __post_init__(self) -> None:
        interval, rate = self.update_interval, self.learning_rate
        _require(interval >= 1, "influence.update_interval", "must be 1 or more", interval)
        _require(self.warmup_steps >= 0, "influence.warmup_steps", "must be 0 or more", self.warmup_steps)
        _require(0 < rate <= 1, "influence.learning_rate", "must be above 0 and at most 1", rate)


@dataclass(kw_only=True, slots=True)
class SelfBoostingConfig:
    """Which examples a model still learns from."""

    influence_threshold: float = 0.0
    """Examples that score above it are kept."""
    min_batch_size: int = 1
    """At least this many are kept, the best ones."""

    def __post_init__(self) -> None:
        _require(
            self.min_batch_size >= 0, "self_boosting.min_batch_size", "must be 0 or more", self.min_batch_size
        )


def choice(kind: type[Choice], value: str, key: str) -> Choice:
    """The member that `value` names, or an error with the closest names."""
    try:
        return kind(value)
    except ValueError:
        names = [member.value for member in kind]
        raise UserError(f"{key}: no such choice", found=value, choices=names) from None


def _require(holds: bool, key: str, rule: str, found: object) -> None:
    # A comparison with NaN is false, so NaN never holds.
    if not holds:
        raise UserError(f"{key}: {rule}", found=found)
