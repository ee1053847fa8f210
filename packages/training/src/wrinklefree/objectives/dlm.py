"""Block diffusion: cross entropy of masked tokens, each predicted by the hidden state one before it.

        Σ_masked −log p(x_i | clean blocks before, own block of x_t) · w_i

`fast_dllm` (Fast-dLLM v2, 2509.26328): w = 1. Two complementary views mask every token once, so the mean
over all that may be masked needs no other weight. `llada` (2502.09992): w = 1 / p, with p the probability
that the token is masked; over random masks this is the mean over all tokens, whatever p is.

Shapes: C tokens of a chunk, N masked tokens, V vocabulary.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from torch import Tensor

from data_handler import Batch
from wrinklefree.objectives.base import Needs, ObjectiveConfig, require
from wrinklefree.objectives.continue_pretrain import cross_entropy
from wrinklefree.objectives.states import States
from wrinklefree.objectives.views import ViewPlan
from wrinklefree.objectives.vocabulary import Places, TokenLoss, VocabularyObjective


class MaskWeighting(StrEnum):
    """What a masked token counts."""

    fast_dllm = "fast_dllm"
    llada = "llada"


@dataclass(kw_only=True, slots=True)
class DLMConfig(ObjectiveConfig):
    """How block diffusion counts; what is masked is said in `training.diffusion`."""

    name: ClassVar[str] = "dlm"

    weighting: str = "fast_dllm"
    """`fast_dllm`: every masked token alike; `llada`: by the inverse of its probability to be masked."""

    def __post_init__(self) -> None:
        ObjectiveConfig.__post_init__(self)  # slots and a bare super() do not meet
        names = " or ".join(MaskWeighting)
        known = self.weighting in list(MaskWeighting)
        require(known, "objectives.dlm.weighting", f"must be {names}", self.weighting)


class DLMObjective(VocabularyObjective):
    """Cross entropy of what is under the masks."""

    name = "dlm"
    of_masked = True

    def __init__(self, *, plan: ViewPlan, weighting: str = "fast_dllm") -> None:
        self.plan = plan
        self.weighting = MaskWeighting(DLMConfig(weighting=weighting).weighting)

    def needs(self) -> Needs:
        return Needs(masked_views=True)

    def count(self, batch: Batch) -> int:
        return masked_count(self.plan, batch, expected=self.weighting is MaskWeighting.llada)

    def token_loss(self, states: States, batch: Batch, places: Places) -> TokenLoss:
        weights_N = None
        if self.weighting is MaskWeighting.llada:
            assert places.probability is not None
            weights_N = (1 / places.probability).to(places.hidden.dtype)

        def loss(logits_CV: Tensor, tokens: slice, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
            targets_C = places.targets[tokens]
            if weights_N is None:
                return cross_entropy(logits_CV, targets_C, label_smoothing=0.0, gradient=gradient)
            return weighted_cross_entropy(logits_CV, targets_C, weights_N[tokens], gradient=gradient)

        return loss


def masked_count(plan: ViewPlan, batch: Batch, *, expected: bool) -> int:
    """How many tokens the views of a batch mask; or the number of which that is one draw, 1 / p each."""
    if plan.complementary and not expected:
        return int(plan.maskable(batch).sum())
    if expected:
        # A view that never masks is no draw.
        num_draws = 1 if plan.mask_prob in (0, 1) else plan.num_views
        return num_draws * int(plan.maskable(batch).sum())
    return sum(int(masked.sum()) for masked in plan.draw(batch).masked)


def weighted_cross_entropy(
    logits_CV: Tensor, targets_C: Tensor, weights_C: Tensor, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """−Σ w log p[target], and its gradient w (p − onehot)."""
    log_CV = logits_CV.log_softmax(dim=-1)
    total = -(weights_C * log_CV.gather(1, targets_C[:, None]).squeeze(1)).sum()
    if not gradient:
        return total, None
    gradient_CV = log_CV.exp_()
    gradient_CV.scatter_add_(1, targets_C[:, None], gradient_CV.new_full((len(targets_C), 1), -1.0))
    return total, gradient_CV.mul_(weights_C[:, None])
