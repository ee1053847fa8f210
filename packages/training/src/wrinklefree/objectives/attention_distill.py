"""Attention relations of one layer follow the teacher's (BitDistill, arXiv 2510.13998, equation 12).

    L_AD = Σ over Q, K, V of the mean over rows and groups of KL(R_T ‖ R_S)

`relations.py` has the formula and its three scalings. Q and K are taken after their norms and the rotation,
as the released code does. A row counts where its token predicts one with a label. One late layer does better
than all of them (the paper's table 6), and which one swings the result.

A weight γ belongs to a scaling. With `cosine`, the default, about 60 makes this loss as large as cross
entropy (an independent reproduction found 58 to 61, and with 60 another 4.7 points on MNLI over the published
γ). The published 1e5 belongs to `code`; with `cosine` it made this loss 1,600 times cross entropy.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitnet_arch import ModelWalk
from data_handler import Batch
from wrinklefree.objectives.base import (
    LossSum,
    Needs,
    Objective,
    ObjectiveConfig,
    is_count,
    is_number,
    require,
)
from wrinklefree.objectives.relations import Normalization, groups_of, relation_divergence
from wrinklefree.objectives.states import States, layer_index
from wrinklefree.objectives.vocabulary import predicting


@dataclass(kw_only=True, slots=True)
class AttentionDistillConfig(ObjectiveConfig):
    """How attention relations count."""

    name: ClassVar[str] = "attention_distill"

    distill_layer: int = -1
    """The layer, from 0, in student and teacher alike; negative numbers count from the end."""
    normalization: str = "cosine"
    """`paper`: equation 12; `cosine`: algorithm 1; `code`: that, divided by the number of groups again."""
    split_heads: int | None = None
    """Groups of the channels of Q, and of K, and of V; none takes the model's own heads. The code has 32."""
    temperature: float = 1.0
    """What A Aᵀ is divided by, besides √d in `paper`."""

    def __post_init__(self) -> None:
        ObjectiveConfig.__post_init__(self)  # slots and a bare super() do not meet
        check_relations(
            self.name,
            distill_layer=self.distill_layer,
            normalization=self.normalization,
            split_heads=self.split_heads,
        )
        positive = is_number(self.temperature) and self.temperature > 0
        require(positive, f"objectives.{self.name}.temperature", "must be above 0", self.temperature)


def check_relations(name: str, *, distill_layer: object, normalization: object, split_heads: object) -> None:
    """What all have that compare relations."""
    key = f"objectives.{name}"
    is_layer = isinstance(distill_layer, int) and not isinstance(distill_layer, bool)
    require(is_layer, f"{key}.distill_layer", "must be a whole number", distill_layer)
    names = " or ".join(Normalization)
    require(normalization in list(Normalization), f"{key}.normalization", f"must be {names}", normalization)
    holds = split_heads is None or is_count(split_heads, at_least=1)
    require(holds, f"{key}.split_heads", "must be 1 or more, or none", split_heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Relations:
    """Which relations are compared, and how."""

    wanted_by: str
    distill_layer: int = -1
    normalization: Normalization = Normalization.cosine
    split_heads: int | None = None
    temperature: float = 1.0

    def check_models(self, student: ModelWalk, teacher: ModelWalk) -> None:
        """UserError for heads that cannot be compared, or a layer that one does not have."""
        key = f"objectives.{self.wanted_by}.distill_layer"
        for walked in (student, teacher):
            layer_index(self.distill_layer, len(walked.layers), key=key)
        queries = [(walked.num_heads, walked.head_dim) for walked in (student, teacher)]
        keys = [(walked.num_kv_heads, walked.head_dim) for walked in (student, teacher)]
        for ours, theirs in (queries, keys):
            groups_of(ours, theirs, self.split_heads, name=self.wanted_by)

    def divergence(self, states: States, batch: Batch) -> Tensor:
        """The sum over all rows that predict a token with a label."""
        assert states.teacher is not None, "the manager brings a teacher where one is needed"
        ours = states.student.relations[self.distill_layer]
        theirs = states.teacher.relations[self.distill_layer]
        wanted_BT = predicting(batch.labels)
        parts = [
            relation_divergence(
                mine,
                taught,
                batch.document_ids,
                wanted_BT,
                num_groups=groups_of(_heads(mine), _heads(taught), self.split_heads, name=self.wanted_by),
                normalization=self.normalization,
                temperature=self.temperature,
            )
            for mine, taught in zip(ours, theirs, strict=True)
        ]
        return torch.stack(parts).sum()


class AttentionRelationDistillationObjective(Objective):
    """The divergence of attention relations."""

    name = "attention_distill"

    def __init__(
        self,
        *,
        distill_layer: int = -1,
        normalization: str = "cosine",
        split_heads: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        config = AttentionDistillConfig(
            distill_layer=distill_layer,
            normalization=normalization,
            split_heads=split_heads,
            temperature=temperature,
        )
        self.relations = Relations(
            wanted_by=self.name,
            distill_layer=config.distill_layer,
            normalization=Normalization(config.normalization),
            split_heads=config.split_heads,
            temperature=config.temperature,
        )

    def needs(self) -> Needs:
        return Needs(relations=frozenset({self.relations.distill_layer}))

    def check_models(self, student: ModelWalk, teacher: ModelWalk) -> None:
        self.relations.check_models(student, teacher)

    def count(self, batch: Batch) -> int:
        return int(predicting(batch.labels).sum())

    def __call__(self, states: States, batch: Batch) -> LossSum:
        return LossSum(self.relations.divergence(states, batch), self.count(batch))


def _heads(heads_BHTD: Tensor) -> tuple[int, int]:
    return heads_BHTD.shape[1], heads_BHTD.shape[3]
