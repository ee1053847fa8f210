"""What a conversion can be asked for."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeVar

from bitnet_arch.calibration_batches import Batch
from durable import ExitCode, UserError


class SubLNPlacement(StrEnum):
    """In front of which projections SubLN goes."""

    none = "none"
    output = "output"
    """o_proj and down_proj: the paper."""
    all = "all"
    """Every projection: the released BitDistill code."""


class SubLNInit(StrEnum):
    """What the gains of a new SubLN are."""

    ones = "ones"
    """The paper. A pretrained model does not survive it without training."""
    calibrated = "calibrated"
    """From the inputs that the projections see on calibration batches."""


class HiddenAct(StrEnum):
    """The activation between gate and down."""

    keep = "keep"
    relu2 = "relu2"


Choice = TypeVar("Choice", bound=StrEnum)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionConfig:
    """What to convert and how. Plain strings are accepted for every choice."""

    exclude: tuple[str, ...] = ()
    """Projections to leave dense: a name (`q_proj`), a path or the end of one (`layers.0.mlp`), or a glob of
    these.
    """
    subln: SubLNPlacement | Literal["none", "output", "all"] = SubLNPlacement.none
    subln_init: SubLNInit | Literal["ones", "calibrated"] = SubLNInit.ones
    calibration_batches: Iterable[Batch] | None = None
    """For `subln_init="calibrated"`: tensors of token ids, or dicts of model inputs."""
    subln_amount: float = 1.0
    """μ of the new SubLNs: 0 leaves the model as it was, 1 is plain SubLN."""
    hidden_act: HiddenAct | Literal["keep", "relu2"] = HiddenAct.keep

    def __post_init__(self) -> None:
        # A lone string would otherwise be taken for its letters.
        given: object = self.exclude
        patterns = (given,) if isinstance(given, str) else tuple(self.exclude)
        object.__setattr__(self, "exclude", patterns)
        object.__setattr__(self, "subln", _choice("subln", self.subln, SubLNPlacement))
        object.__setattr__(self, "subln_init", _choice("subln_init", self.subln_init, SubLNInit))
        object.__setattr__(self, "hidden_act", _choice("hidden_act", self.hidden_act, HiddenAct))
        if not 0 <= self.subln_amount <= 1:
            raise UserError(
                "subln_amount must lie between 0 and 1",
                found=str(self.subln_amount),
                fix="0 keeps the original function, 1 is plain SubLN",
                exit_code=ExitCode.BAD_INPUT,
            )
        if self.subln_init == SubLNInit.calibrated and self.calibration_batches is None:
            raise UserError(
                "subln_init=calibrated needs calibration_batches",
                found="none",
                fix="pass a few batches of token ids, or subln_init=ones",
                exit_code=ExitCode.BAD_INPUT,
            )


def _choice(name: str, value: str, kind: type[Choice]) -> Choice:
    try:
        return kind(value)
    except ValueError:
        names = [member.value for member in kind]
        raise UserError(
            f"{name}: no such choice", found=value, exit_code=ExitCode.BAD_INPUT, choices=names
        ) from None
