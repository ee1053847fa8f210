"""Continued pretraining: cross entropy of the token that follows.

Logits of a token are compared with the label of the next one. Statistics are float32 whatever the model
computes in.

Shapes: C tokens of a chunk, N tokens with a label, V vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from data_handler import Batch
from wrinklefree.objectives.base import ObjectiveConfig, is_number, require
from wrinklefree.objectives.states import States
from wrinklefree.objectives.vocabulary import Places, TokenLoss, VocabularyObjective


@dataclass(kw_only=True, slots=True)
class ContinuePretrainConfig(ObjectiveConfig):
    """How continued pretraining counts."""

    name: ClassVar[str] = "continue_pretrain"

    label_smoothing: float = 0.0
    """Share of the target that is spread over the whole vocabulary."""

    def __post_init__(self) -> None:
        ObjectiveConfig.__post_init__(self)  # slots and a bare super() do not meet
        in_range = is_number(self.label_smoothing, at_least=0) and self.label_smoothing < 1
        key = "objectives.continue_pretrain.label_smoothing"
        require(in_range, key, "must be at least 0 and below 1", self.label_smoothing)


class ContinuePretrainObjective(VocabularyObjective):
    """Cross entropy of the next token."""

    name = "continue_pretrain"

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = ContinuePretrainConfig(label_smoothing=label_smoothing).label_smoothing

    def token_loss(self, states: States, batch: Batch, places: Places) -> TokenLoss:
        def loss(logits_CV: Tensor, tokens: slice, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
            return cross_entropy(
                logits_CV, places.targets[tokens], label_smoothing=self.label_smoothing, gradient=gradient
            )

        return loss


def cross_entropy(
    logits_CV: Tensor, labels_C: Tensor, *, label_smoothing: float, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """−Σ (1 − ε) log p[label] + ε mean(log p), and its gradient p − (1 − ε) onehot − ε / V.

    V counts the tokens that can be predicted: logits of −∞ belong to none.
    """
    log_CV = torch.log_softmax(logits_CV, dim=-1)
    total = -(1 - label_smoothing) * log_CV.gather(1, labels_C[:, None]).sum()
    if label_smoothing:
        possible_CV = logits_CV != -torch.inf
        share_CV = possible_CV * (label_smoothing / possible_CV.sum(1, keepdim=True))
        total = total - (share_CV * log_CV.masked_fill(~possible_CV, 0)).sum()
    if not gradient:
        return total, None
    gradient_CV = log_CV.exp_()
    gradient_CV.scatter_add_(
        1, labels_C[:, None], gradient_CV.new_full((len(labels_C), 1), label_smoothing - 1)
    )
    return total, gradient_CV.sub_(share_CV) if label_smoothing else gradient_CV
