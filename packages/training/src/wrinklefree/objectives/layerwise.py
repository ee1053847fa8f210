"""Layer-wise distillation: the student's hidden states follow the teacher's, layer by layer.

    create_objective("layerwise", {"loss_type": "inner_product", "layer_weights": "progressive"})

`hidden_states.py` says which tokens and layers. `inner_product` is 1 − ⟨s, t⟩ of states of length 1: the
earlier system's −⟨s, t⟩ plus 1, so 0 is perfect. `mse_normalized` is 2 / hidden size times that: beside cross
entropy its weight must be large (at 576 a loss of 0.0019 is a cosine of 0.46).
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from wrinklefree.objectives.hidden_states import HiddenStateConfig, HiddenStateObjective


class LayerwiseLossType(StrEnum):
    """How far two hidden states are from each other."""

    mse = "mse"
    mse_normalized = "mse_normalized"
    inner_product = "inner_product"


@dataclass(kw_only=True, slots=True)
class LayerwiseConfig(HiddenStateConfig):
    """How hidden states count."""

    name: ClassVar[str] = "layerwise"
    loss_types: ClassVar[type[StrEnum]] = LayerwiseLossType

    loss_type: str = "mse_normalized"
    """`mse`; `mse_normalized`: of states of length 1; `inner_product`: 1 − their inner product."""


class LayerwiseDistillationObjective(HiddenStateObjective):
    """The distance of hidden states."""

    name = "layerwise"
    config = LayerwiseConfig
