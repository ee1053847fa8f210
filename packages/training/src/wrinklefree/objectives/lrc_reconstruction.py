"""What low-rank correction learns: the hidden states of the model as it was before quantisation.

The paper (LRC, arXiv 2412.07902) corrects one matrix at a time, ‖WX − (Ŵ Q(X) + UVᵀX)‖², and `bitnet_arch`
solves that in closed form. This is what is trained afterwards: hidden states of all layers together, so that
a correction also answers for the errors of the layers before it. `hidden_states.py` says which tokens and
layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from torch import Tensor

from wrinklefree.objectives.base import ObjectiveConfig, require
from wrinklefree.objectives.hidden_states import (
    HiddenStateObjective,
    checked_layers,
    checked_weights,
    cosine_distance,
    mse,
    mse_normalized,
)


class LRCLossType(StrEnum):
    """How far two hidden states are from each other."""

    mse = "mse"
    mse_normalized = "mse_normalized"
    cosine = "cosine"


@dataclass(kw_only=True, slots=True)
class LRCReconstructionConfig(ObjectiveConfig):
    """How hidden states count."""

    name: ClassVar[str] = "lrc_reconstruction"

    loss_type: str = "mse"
    """`mse`; `mse_normalized`: of states of length 1; `cosine`: 1 − cos."""
    layer_weights: Any = None
    """`none`: all layers alike; `progressive`: 1, 2, 3 …; `exponential`: 1, 2, 4 …; or a number for each."""
    teacher_layers: Any = None
    """The teacher's layer for each of the student's, from 0; none takes the same, of as many layers."""

    def __post_init__(self) -> None:
        ObjectiveConfig.__post_init__(self)  # slots and a bare super() do not meet
        names = " or ".join(LRCLossType)
        known = self.loss_type in list(LRCLossType)
        require(known, "objectives.lrc_reconstruction.loss_type", f"must be {names}", self.loss_type)
        checked_weights(self.name, self.layer_weights)
        checked_layers(self.name, self.teacher_layers)


class LRCReconstructionObjective(HiddenStateObjective):
    """The distance to the hidden states of the full-precision model."""

    name = "lrc_reconstruction"

    def __init__(
        self,
        *,
        loss_type: str = "mse",
        layer_weights: str | Sequence[float] | None = None,
        teacher_layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(layer_weights=layer_weights, teacher_layers=teacher_layers)
        self.loss_type = LRCLossType(LRCReconstructionConfig(loss_type=loss_type).loss_type)

    def distance(self, student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
        match self.loss_type:
            case LRCLossType.mse:
                return mse(student_ND, teacher_ND)
            case LRCLossType.mse_normalized:
                return mse_normalized(student_ND, teacher_ND)
            case LRCLossType.cosine:
                return cosine_distance(student_ND, teacher_ND)
