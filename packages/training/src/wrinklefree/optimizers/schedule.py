"""Learning rate and weight decay over a run, as pure functions of the optimizer step.

    factor
      1 |    ______________________        wsd: warm-up, stable, decay
        |   /                      \\
        |  /                        \\
    min | /                          \\
        +-----------------------------> step

`step` is the number of steps already taken, so the first step of a warm-up of w has the factor 1/w, and the
last one of the run is still above the minimum, which stands at `total_steps`. Weight decay in two stages is
BitNet's (2402.17764): the magnitude of a latent weight is its confidence, and decay late in training wears
that off.
"""

import math
from typing import assert_never

from torch.optim import Optimizer

from durable import UserError
from wrinklefree.optimizers.config import DecayType, OptimizerConfig, SchedulerConfig, SchedulerType


def learning_rate_factor(step: int, total_steps: int, config: SchedulerConfig) -> float:
    """What the peak learning rate is multiplied by for the step after `step` others."""
    warmup = warmup_steps(total_steps, config)
    if step < warmup:
        return (step + 1) / warmup
    match config.type:
        case SchedulerType.constant:
            return 1.0
        case SchedulerType.wsd:
            start = total_steps - _decay_steps(total_steps, config)
            return _decay(step, start, total_steps, config, config.decay_type is DecayType.cosine)
        case SchedulerType.cosine | SchedulerType.linear:
            return _decay(step, warmup, total_steps, config, config.type is SchedulerType.cosine)
        case _:
            assert_never(config.type)


def warmup_steps(total_steps: int, config: SchedulerConfig) -> int:
    """Steps up to the peak: what a person wrote, if it fits into the run, else a share of it."""
    room = total_steps - _decay_steps(total_steps, config)
    if config.warmup_steps is None:
        return min(config.warmup_limit_steps, _share(config.warmup_share, total_steps), room)
    if config.warmup_steps > room:
        decay = f" and {total_steps - room} of decay" if room < total_steps else ""
        raise UserError(
            "training.scheduler.warmup_steps: does not fit into the run",
            f"{config.warmup_steps} steps of warm-up{decay} in training.max_steps={total_steps}",
            f"give at most {room}, or none for a share of the run",
        )
    return config.warmup_steps


def weight_decay_at(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Weight decay for the step after `step` others."""
    if config.weight_decay_final is None or step < _share(config.weight_decay_switch, total_steps):
        return config.weight_decay
    return config.weight_decay_final


def apply_schedule(optimizer: Optimizer, factor: float, weight_decay: float | None = None) -> None:
    """Set every group's learning rate to its own peak times `factor`, and the weight decay of those that
    decay; none leaves it.
    """
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        if weight_decay is not None and group.get("decays", True):
            group["weight_decay"] = weight_decay


def _decay(step: int, start: int, end: int, config: SchedulerConfig, is_cosine: bool) -> float:
    """1 up to `start`, `min_lr_ratio` from `end` on."""
    progress = min(max(0.0, (step - start) / max(1, end - start)), 1.0)
    height = (1 + math.cos(math.pi * progress)) / 2 if is_cosine else 1 - progress
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * height


def _decay_steps(total_steps: int, config: SchedulerConfig) -> int:
    return _share(config.decay_ratio, total_steps) if config.type is SchedulerType.wsd else 0


def _share(share: float, total_steps: int) -> int:
    """Whole steps; 0.29 of 100 are 29, though the product is a little less."""
    return int(share * total_steps + 1e-9)
