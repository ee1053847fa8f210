"""Layer-wise distillation: the student's hidden states follow the teacher's, layer by layer.

    create_objective("layerwise", {"loss_type": "inner_product", "layer_weights": "progressive"})

`hidden_states.py` says which tokens and layers. `inner_product` is 1 − ⟨s, t⟩ of states of length 1: the
earlier system's −⟨s, t⟩ plus 1, so 0 is perfect. `mse_normalized` is 2 / hidden size times that: beside cross
entropy its weight must be large (at 576 a loss of 0.0019 is a cosine of 0.46).
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


class LayerwiseLossType(StrEnum):
    """How far two hidden states are from each other."""

    mse = "mse"
    mse_normalized = "mse_normalized"
    inner_product = "inner_product"


@dataclass(kw_only=True, slots=True)
class LayerwiseConfig(ObjectiveConfig):
    """How hidden states count."""

    name: ClassVar[str] = "layerwise"

    loss_type: str = "mse_normalized"
    """`mse`; `mse_normalized`: of states of length 1; `inner_product`: 1 − their inner product."""
    layer_weights: Any = None
    """`none`: all layers alike; `progressive`: 1, 2, 3 …; `exponential`: 1, 2, 4 …; or a number for each."""
    teacher_layers: Any = None
    """The teacher's layer for each of the student's, from 0; none takes the same, of as many layers."""

    def __post_init__(self) -> None:
        ObjectiveConfig.__post_init__(self)  # slots and a bare super() do not meet
        names = " or ".join(LayerwiseLossType)
        known = self.loss_type in list(LayerwiseLossType)
        require(known, "objectives.layerwise.loss_type", f"must be {names}", self.loss_type)
        checked_weights(self.name, self.layer_weights)
        checked_layers(self.name, self.teacher_layers)


class LayerwiseDistillationObjective(HiddenStateObjective):
    """The distance of hidden states."""

    name = "layerwise"

    def __init__(
        self,
        *,
        loss_type: str = "mse_normalized",
        layer_weights: str | Sequence[float] | None = None,
        teacher_layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(layer_weights=layer_weights, teacher_layers=teacher_layers)
        self.loss_type = LayerwiseLossType(LayerwiseConfig(loss_type=loss_type).loss_type)

    def distance(self, student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
        match self.loss_type:
            case LayerwiseLossType.mse:
                return mse(student_ND, teacher_ND)
            case LayerwiseLossType.mse_normalized:
                return mse_normalized(student_ND, teacher_ND)
            case LayerwiseLossType.inner_product:
                return cosine_distance(student_ND, teacher_ND)
