"""What a user may set about the optimizer, its schedules and gradient clipping.

Learning rates are peaks: the schedule multiplies them. A number of steps that nobody wrote is a share of the
run with an upper limit, so that defaults hold at any length.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from data_handler.influence.config import choice
from durable import UserError


class OptimizerType(StrEnum):
    """Which rule moves the weights."""

    muonclip = "muonclip"
    """Muon for the matrices inside decoder layers, AdamW for the rest, QK-clip after the step."""
    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    """AdamW with 8-bit moments, by bitsandbytes."""


class SchedulerType(StrEnum):
    """The course of the learning rate after warm-up."""

    wsd = "wsd"
    """Stable, then a decay at the end."""
    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class DecayType(StrEnum):
    """How `wsd` goes down."""

    linear = "linear"
    cosine = "cosine"


class ZClipMode(StrEnum):
    """Where ZClip clips a spike to; `mean` and `std` are those of earlier norms."""

    adaptive = "adaptive"
    """mean + z_threshold²·std / z: the larger the spike, the smaller the limit."""
    percentile = "percentile"
    """mean + z_threshold·std."""
    mean = "mean"


@dataclass(kw_only=True)
class OptimizerConfig:
    """How weights move."""

    type: OptimizerType = OptimizerType.muonclip
    lr: float | None = None
    """Peak learning rate of adamw and adamw_8bit; none takes `lr_adam`."""
    lr_muon: float = 0.005
    """Peak learning rate of muonclip for matrices; a step moves their entries by 0.2 × this (RMS)."""
    lr_adam: float = 5e-5
    """Peak learning rate of muonclip for embeddings, head, norms, biases and low-rank factors."""
    weight_decay: float = 0.0
    """Per unit of learning rate, on whatever has two dimensions or more."""
    weight_decay_final: float | None = None
    """Weight decay after the switch; none never switches. BitNet b1.58 goes from 0.1 to 0."""
    weight_decay_switch: float = 0.5
    """Share of the run after which `weight_decay_final` holds."""
    momentum: float = 0.95
    """Of muonclip's matrices."""
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    adam_eps: float = 1e-8
    enable_clipping: bool = True
    """QK-clip after each step of muonclip."""
    clipping_threshold: float = 50.0
    """Largest attention logit that QK-clip leaves alone."""
    clipping_alpha: float = 0.5
    """Share of the correction, as an exponent, that W_q takes; W_k takes the rest."""

    def __post_init__(self) -> None:
        self.type = choice(OptimizerType, self.type, "training.optimizer.type")
        if self.lr is not None and self.type is OptimizerType.muonclip:
            raise UserError(
                "training.optimizer.lr: muonclip has two learning rates",
                self.lr,
                "set lr_muon and lr_adam, or type=adamw",
            )
        for name in ("lr", "lr_muon", "lr_adam", "weight_decay", "weight_decay_final"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < float("inf"), f"optimizer.{name}", "0 or more", value)
        for name in ("weight_decay_switch", "clipping_alpha"):
            _require(0 <= getattr(self, name) <= 1, f"optimizer.{name}", "0 to 1", getattr(self, name))
        _require(0 <= self.momentum < 1, "optimizer.momentum", "0 to below 1", self.momentum)
        _require(self.adam_eps > 0, "optimizer.adam_eps", "a number above 0", self.adam_eps)
        threshold = self.clipping_threshold
        _require(threshold > 0, "optimizer.clipping_threshold", "a number above 0", threshold)
        betas = [float(beta) for beta in self.adam_betas]
        are_betas = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
        _require(are_betas, "optimizer.adam_betas", "two numbers from 0 to below 1", betas)
        self.adam_betas = betas

    @property
    def adamw_lr(self) -> float:
        """Peak learning rate of the types that have one."""
        return self.lr_adam if self.lr is None else self.lr


@dataclass(kw_only=True)
class SchedulerConfig:
    """How the learning rate of every group goes, as a factor of the group's own peak."""

    type: SchedulerType = SchedulerType.wsd
    warmup_steps: int | None = None
    """Optimizer steps up to the peak; none takes a share of the run."""
    warmup_share: float = 0.1
    """Of the run, when `warmup_steps` is none."""
    warmup_limit_steps: int = 550
    """At most so many steps, when `warmup_steps` is none."""
    decay_ratio: float = 0.2
    """Share of the run over which `wsd` decays, at its end."""
    decay_type: DecayType = DecayType.linear
    """Of `wsd`."""
    min_lr_ratio: float = 0.0
    """Factor at the end of the run."""

    def __post_init__(self) -> None:
        self.type = choice(SchedulerType, self.type, "training.scheduler.type")
        self.decay_type = choice(DecayType, self.decay_type, "training.scheduler.decay_type")
        for name in ("warmup_share", "decay_ratio", "min_lr_ratio"):
            _require(0 <= getattr(self, name) <= 1, f"scheduler.{name}", "0 to 1", getattr(self, name))
        steps, limit = self.warmup_steps, self.warmup_limit_steps
        _require(steps is None or steps >= 0, "scheduler.warmup_steps", "0 or more", steps)
        _require(limit >= 0, "scheduler.warmup_limit_steps", "0 or more", limit)


@dataclass(kw_only=True)
class ZClipConfig:
    """Clipping of gradient norms that stand out from the norms before them (ZClip, arXiv 2504.02507)."""

    enabled: bool = False
    z_threshold: float = 2.5
    """Standard deviations above the mean from which a norm is a spike."""
    ema_decay: float = 0.97
    """Weight of the past in the running mean and variance."""
    warmup_steps: int = 25
    """Norms that mean and variance start from; no spike is looked for before."""
    mode: ZClipMode = ZClipMode.adaptive
    clip_factor: float = 1.0
    """Multiplies the limit of `adaptive`."""
    min_limit: float = 0.0
    """A spike is never clipped below this norm."""
    skip_update_on_spike: bool = False
    """Leave mean and variance as they are after a spike; else they take in the clipped norm."""

    def __post_init__(self) -> None:
        key = "gradient_clipping.zclip"
        self.mode = choice(ZClipMode, self.mode, f"training.{key}.mode")
        for name in ("z_threshold", "clip_factor"):
            _require(getattr(self, name) > 0, f"{key}.{name}", "a number above 0", getattr(self, name))
        _require(0 <= self.ema_decay < 1, f"{key}.ema_decay", "0 to below 1", self.ema_decay)
        _require(self.min_limit >= 0, f"{key}.min_limit", "0 or more", self.min_limit)
        # One norm has no spread: every larger one would be a spike, for ever.
        _require(self.warmup_steps >= 2, f"{key}.warmup_steps", "2 or more", self.warmup_steps)


@dataclass(kw_only=True)
class GradientClippingConfig:
    """How large the gradient of an optimizer step may be, all parameters together."""

    max_norm: float | None = 1.0
    """Fixed limit, with ZClip too; none has no fixed limit."""
    zclip: ZClipConfig = field(default_factory=ZClipConfig)

    def __post_init__(self) -> None:
        norm = self.max_norm
        _require(norm is None or norm > 0, "gradient_clipping.max_norm", "a number above 0, or none", norm)


def _require(holds: bool, key: str, accepted: str, found: object) -> None:
    # A comparison with NaN is false, so NaN never holds.
    if not holds:
        raise UserError(f"training.{key}: out of range", found, f"give {accepted}")
