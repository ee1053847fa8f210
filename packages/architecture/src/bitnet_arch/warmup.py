"""When quantisation comes in: λ over the first optimizer steps ("Fine-tuning LLMs to 1.58bit", HF, 2024).

    λ(step) = min + (max - min)·shape(min(step / warmup_steps, 1)),   shape: linear p, cosine (1 - cos πp) / 2

A warmup acts on one model and keeps nothing global, so a ternary teacher next to the student stays as it is.
λ is a function of the step alone: after a resume it goes on where it stopped.
"""

import math
from enum import StrEnum
from typing import Any

from torch import nn

from bitnet_arch.bitlinear import BitLinear, set_quant_amount
from durable import ExitCode, UserError


class Schedule(StrEnum):
    """The shape of the way from the first λ to the last."""

    linear = "linear"
    cosine = "cosine"


class LambdaWarmup:
    """Moves the λ of all ternary layers of `model`, one `step()` per optimizer step."""

    def __init__(
        self,
        model: nn.Module,
        warmup_steps: int = 1000,
        schedule: str = "linear",
        min_lambda: float = 0.0,
        max_lambda: float = 1.0,
        *,
        activations: bool = True,
    ) -> None:
        self.model = model
        self._configure(warmup_steps, schedule, min_lambda, max_lambda, activations)
        self.current_step = 0
        self._apply()

    def step(self) -> float:
        """Count one optimizer step and set the λ that belongs to it."""
        self.current_step += 1
        return self._apply()

    @property
    def lambda_val(self) -> float:
        """The λ of the present step."""
        if self.is_warmup_complete():
            return self.max_lambda
        share = ramp_amount(self.current_step, self.warmup_steps, self.schedule)
        return self.min_lambda + (self.max_lambda - self.min_lambda) * share

    def is_warmup_complete(self) -> bool:
        return self.current_step >= self.warmup_steps

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model, as plain numbers and strings."""
        return {
            "current_step": self.current_step,
            "lambda": self.lambda_val,
            "warmup_steps": self.warmup_steps,
            "schedule": self.schedule.value,
            "min_lambda": self.min_lambda,
            "max_lambda": self.max_lambda,
            "activations": self.activations,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the warmup that was saved, schedule and ends included, and set its λ on the model."""
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise UserError(
                "lambda_warmup: the saved state is incomplete",
                f"no {', '.join(sorted(missing))}",
                "resume from a checkpoint that was written by LambdaWarmup.state_dict()",
                ExitCode.BAD_DATA,
            )
        self._configure(
            state["warmup_steps"],
            state["schedule"],
            state["min_lambda"],
            state["max_lambda"],
            state["activations"],
        )
        self.current_step = int(state["current_step"])
        self._apply()

    def _configure(
        self, warmup_steps: int, schedule: str, min_lambda: float, max_lambda: float, activations: bool
    ) -> None:
        _check_steps(warmup_steps)
        if schedule not in list(Schedule):
            raise UserError("lambda_warmup.schedule: unknown schedule", schedule, choices=list(Schedule))
        if not 0 <= min_lambda <= max_lambda <= 1:
            raise UserError(
                "lambda_warmup: λ goes from min_lambda up to max_lambda, within 0 and 1",
                f"{min_lambda} to {max_lambda}",
                "give 0 <= min_lambda <= max_lambda <= 1",
            )
        self.warmup_steps, self.schedule = int(warmup_steps), Schedule(schedule)
        self.min_lambda, self.max_lambda = float(min_lambda), float(max_lambda)
        self.activations = activations

    def _apply(self) -> float:
        amount = self.lambda_val
        set_quant_amount(self.model, amount, activations=self.activations)
        return amount


class BitLinearWithWarmup(BitLinear):
    """A ternary layer with steps of its own: λ = min(step / warmup_steps, 1), activations always quantised.

    For whole models prefer `LambdaWarmup`, which moves all layers together and has a state to save. A layer's
    step is no part of its `state_dict`; set `current_step` to continue.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        warmup_steps: int = 1000,
        **kwargs: Any,
    ) -> None:
        _check_steps(warmup_steps)
        super().__init__(in_features, out_features, bias, **kwargs)
        self.warmup_steps = warmup_steps
        self.current_step = 0

    @property
    def current_step(self) -> int:
        """Steps so far. Setting it sets λ."""
        return self._current_step

    @current_step.setter
    def current_step(self, step: int) -> None:
        self._current_step = step
        self.quant_amount = 1.0 if step >= self.warmup_steps else step / self.warmup_steps

    def step(self) -> float:
        """Count one optimizer step and return the λ that belongs to it."""
        self.current_step += 1
        return self.quant_amount


def ramp_amount(step: int, steps: int, schedule: Schedule = Schedule.linear) -> float:
    """How far a dial is, from 0 to 1, after `step` of `steps` optimizer steps."""
    if step >= steps:
        return 1.0
    progress = step / steps
    match schedule:
        case Schedule.linear:
            return progress
        case Schedule.cosine:
            return (1 - math.cos(math.pi * progress)) / 2


def _check_steps(warmup_steps: int) -> None:
    if warmup_steps < 0:
        raise UserError(
            "lambda_warmup.warmup_steps: steps cannot be negative", warmup_steps, "give 0 (no warmup) or more"
        )
