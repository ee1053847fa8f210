"""What low-rank correction learns: the hidden states of the model as it was before quantisation.

The paper (LRC, arXiv 2412.07902) corrects one matrix at a time, ‖WX − (Ŵ Q(X) + UVᵀX)‖², and `bitnet_arch`
solves that in closed form. This is what is trained afterwards: hidden states of all layers together, so that
a correction also answers for the errors of the layers before it. `hidden_states.py` says which tokens and
layers.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from wrinklefree.objectives.hidden_states import HiddenStateConfig, HiddenStateObjective


class LRCLossType(StrEnum):
    """How far two hidden states are from each other."""

    mse = "mse"
    mse_normalized = "mse_normalized"
    cosine = "cosine"


@dataclass(kw_only=True, slots=True)
class LRCReconstructionConfig(HiddenStateConfig):
    """How hidden states count."""

    name: ClassVar[str] = "lrc_reconstruction"
    loss_types: ClassVar[type[StrEnum]] = LRCLossType

    loss_type: str = "mse"
    """`mse`; `mse_normalized`: of states of length 1; `cosine`: 1 − cos."""


class LRCReconstructionObjective(HiddenStateObjective):
    """The distance to the hidden states of the full-precision model."""

    name = "lrc_reconstruction"
    config = LRCReconstructionConfig
