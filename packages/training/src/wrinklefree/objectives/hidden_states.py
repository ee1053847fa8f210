"""Distances between hidden states of student and teacher, layer by layer.

        Σ_tokens Σ_layers w_l · d(h_l of the student, h_l of the teacher),  Σ_l w_l = 1

h_l is what decoder layer l gives to the next, the last one's before the final norm; the embedding is not
compared. A token counts when it has a label or the one after it has: all tokens of a text, none of padding,
and of a prompt without labels only the last. Distances are float32 at least.

    mse              mean over the hidden size of (s − t)²
    mse_normalized   the same of s / |s| and t / |t|, that is 2 (1 − cos) / hidden size
    cosine           1 − cos

Shapes: B samples, T tokens, N that count, D hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bitnet_arch import ModelWalk
from data_handler import Batch
from data_handler.types import IGNORED_LABEL
from durable import UserError
from wrinklefree.objectives.base import LossSum, Needs, Objective, ObjectiveConfig, is_number, require
from wrinklefree.objectives.head import accurate
from wrinklefree.objectives.states import States, layer_index

SMALLEST_NORM = 1e-6
"""Of a hidden state that is divided by its norm."""


class LayerWeights(StrEnum):
    """How much each of n layers counts, before their sum is made 1."""

    none = "none"
    """All alike."""
    progressive = "progressive"
    """1, 2, … n."""
    exponential = "exponential"
    """1, 2, 4, …"""


def mse(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """[N]: the mean squared difference."""
    return (student_ND - teacher_ND).square().mean(dim=-1)


def mse_normalized(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """[N]: of states of length 1."""
    return mse(_unit(student_ND), _unit(teacher_ND))


def cosine_distance(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """[N]: 1 − cos, as half the squared difference of unit vectors, which is exact where they agree."""
    return (_unit(student_ND) - _unit(teacher_ND)).square().sum(dim=-1) / 2


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mse,
    "mse_normalized": mse_normalized,
    "cosine": cosine_distance,
    "inner_product": cosine_distance,
}
"""By loss type; each objective names those that it takes."""


@dataclass(kw_only=True, slots=True)
class HiddenStateConfig(ObjectiveConfig):
    """What can be set about objectives on hidden states."""

    loss_types: ClassVar[type[StrEnum]]

    loss_type: str = "mse"
    layer_weights: Any = None
    """`none`: all layers alike; `progressive`: 1, 2, 3 …; `exponential`: 1, 2, 4 …; or a number for each."""
    teacher_layers: Any = None
    """The teacher's layer for each of the student's, from 0; none takes the same, of as many layers."""

    def __post_init__(self) -> None:
        ObjectiveConfig.__post_init__(self)  # slots and a bare super() do not meet
        known = self.loss_type in list(self.loss_types)
        names = " or ".join(self.loss_types)
        require(known, f"objectives.{self.name}.loss_type", f"must be {names}", self.loss_type)
        checked_weights(self.name, self.layer_weights)
        checked_layers(self.name, self.teacher_layers)


def compared(labels_BT: Tensor) -> Tensor:
    """[B, T] boolean: tokens with a label, and those whose next one has one."""
    has_label_BT = labels_BT != IGNORED_LABEL
    wanted_BT = has_label_BT.clone()
    wanted_BT[:, :-1] |= has_label_BT[:, 1:]
    return wanted_BT


def layer_shares(weights: LayerWeights | Sequence[float], num_layers: int, *, key: str) -> list[float]:
    """One share per layer, 1 together."""
    if not isinstance(weights, LayerWeights):
        if len(weights) != num_layers:
            raise UserError(
                f"{key}: there must be one weight for every layer",
                f"{len(weights)} weights, the student has {num_layers} layers",
                f"give {num_layers} numbers, or one of {', '.join(LayerWeights)}",
            )
        raw = [float(weight) for weight in weights]
    elif weights is LayerWeights.progressive:
        raw = [float(layer + 1) for layer in range(num_layers)]
    elif weights is LayerWeights.exponential:
        raw = [2.0**layer for layer in range(num_layers)]
    else:
        raw = [1.0] * num_layers
    return [weight / sum(raw) for weight in raw]


def teacher_layer_of(
    num_student: int, num_teacher: int, teacher_layers: Sequence[int] | None, *, key: str
) -> list[int]:
    """Which layer of the teacher each of the student's is compared with."""
    if teacher_layers is None:
        if num_student != num_teacher:
            raise UserError(
                f"{key}: student and teacher have different numbers of layers",
                f"{num_student} and {num_teacher}",
                f"give {num_student} numbers, the teacher's layer for each of the student's",
            )
        return list(range(num_student))
    if len(teacher_layers) != num_student:
        raise UserError(
            f"{key}: there must be one layer of the teacher for every layer of the student",
            f"{len(teacher_layers)}, the student has {num_student}",
            f"give {num_student} numbers",
        )
    return [layer_index(layer, num_teacher, key=key) for layer in teacher_layers]


def check_hidden_sizes(student: int, teacher: int, *, name: str) -> None:
    """There is no projection between them: it would have to be learned, and thrown away."""
    if student != teacher:
        raise UserError(
            f"objectives.{name}: student and teacher have different hidden sizes",
            f"{student} and {teacher}",
            "choose a teacher of the student's size, or distil logits or attention",
        )


class HiddenStateObjective(Objective):
    """What objectives on hidden states have in common."""

    config: ClassVar[type[HiddenStateConfig]]

    def __init__(
        self,
        *,
        loss_type: str | None = None,
        layer_weights: str | Sequence[float] | None = None,
        teacher_layers: Sequence[int] | None = None,
    ) -> None:
        config = self.config(layer_weights=layer_weights, teacher_layers=teacher_layers)
        if loss_type is not None:
            config = replace(config, loss_type=loss_type)
        self.distance = DISTANCES[config.loss_type]
        self.layer_weights = checked_weights(self.name, layer_weights)
        self.teacher_layers = checked_layers(self.name, teacher_layers)

    def needs(self) -> Needs:
        return Needs(hidden_states=True)

    def count(self, batch: Batch) -> int:
        return int(compared(batch.labels).sum())

    def check_models(self, student: ModelWalk, teacher: ModelWalk) -> None:
        self._layers(len(student.layers), len(teacher.layers))
        check_hidden_sizes(student.hidden_size, teacher.hidden_size, name=self.name)

    def __call__(self, states: States, batch: Batch) -> LossSum:
        assert states.teacher is not None, "the manager brings a teacher where one is needed"
        ours, theirs = states.student.layers, states.teacher.layers
        layers = self._layers(len(ours), len(theirs))
        check_hidden_sizes(ours[0].shape[-1], theirs[0].shape[-1], name=self.name)
        wanted_N = compared(batch.labels).flatten().nonzero().squeeze(1)
        parts = [
            share * self._layer_sum(mine_BTD, theirs[layer], wanted_N)
            for mine_BTD, (layer, share) in zip(ours, layers, strict=True)
            if share
        ]
        return LossSum(torch.stack(parts).sum(), self.count(batch))

    def _layers(self, num_student: int, num_teacher: int) -> list[tuple[int, float]]:
        """For each of the student's layers the teacher's, and its share."""
        key = f"objectives.{self.name}"
        pairs = teacher_layer_of(num_student, num_teacher, self.teacher_layers, key=f"{key}.teacher_layers")
        shares = layer_shares(self.layer_weights, num_student, key=f"{key}.layer_weights")
        return list(zip(pairs, shares, strict=True))

    def _layer_sum(self, student_BTD: Tensor, teacher_BTD: Tensor, wanted_N: Tensor) -> Tensor:
        """What is made on the way is made again for the gradient: kept for all layers, it would be larger
        than the layers.
        """

        def total(student_BTD: Tensor, teacher_BTD: Tensor) -> Tensor:
            rows = (each.flatten(0, 1).index_select(0, wanted_N) for each in (student_BTD, teacher_BTD))
            student_ND, teacher_ND = (each.to(accurate(each.dtype)) for each in rows)
            return self.distance(student_ND, teacher_ND).sum()

        result: Tensor = checkpoint(
            total, student_BTD, teacher_BTD, use_reentrant=False, preserve_rng_state=False
        )
        return result


def checked_weights(name: str, weights: Any) -> LayerWeights | tuple[float, ...]:
    """A name, or numbers of which one is above 0."""
    if weights is None or isinstance(weights, str):
        known = weights is None or weights in list(LayerWeights)
        names = f"must be numbers, {', '.join(LayerWeights)}"
        require(known, f"objectives.{name}.layer_weights", names, weights)
        return LayerWeights.none if weights is None else LayerWeights(weights)
    holds = isinstance(weights, Sequence) and all(is_number(weight, at_least=0) for weight in weights)
    holds = holds and sum(weights) > 0
    problem = "must be numbers, 0 or more, one of them above"
    require(holds, f"objectives.{name}.layer_weights", problem, weights)
    return tuple(float(weight) for weight in weights)


def checked_layers(name: str, layers: Any) -> tuple[int, ...] | None:
    """Whole numbers, or none."""
    if layers is None:
        return None
    holds = isinstance(layers, Sequence) and not isinstance(layers, str)
    holds = holds and all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers)
    require(holds, f"objectives.{name}.teacher_layers", "must be numbers of layers, or none", layers)
    return tuple(layers)


def _unit(states_ND: Tensor) -> Tensor:
    return F.normalize(states_ND, dim=-1, eps=SMALLEST_NORM)
