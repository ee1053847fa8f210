"""How far a student's distribution over a token is from a teacher's, and the gradient of that by hand.

    forward    KL(T ‖ S) = Σ p_T (log p_T − log p_S)          in the student's logits: p_S − p_T
    reverse    KL(S ‖ T) = Σ p_S (log p_S − log p_T)                    p_S (log p_S − log p_T − KL)
    adaptive   (1 − g) forward + g reverse,  g = 1 − H(p_T) / log k, cut to 0 … 1

The last is EdgeRazor's (2605.04062, k = 16): of a teacher who is sure the student takes the peak, of one who
is not the whole. There g is a mean over the batch; here each token has its own, so it does not depend on how
a step is cut.

All p = softmax(z / τ). With a top k they are the teacher's K most probable tokens and one more outcome, all
others together: KL over K + 1, which is never more than over the whole vocabulary, and the same at K = V. A
teacher that only tells its top k at τ = 1 cannot be softened, since nobody knows how the rest is spread.

Outcomes that the teacher rules out (log p = −∞) have no part in the reverse direction, which they would make
infinite.

Shapes: C tokens of a chunk, V the teacher's vocabulary, S the student's, K most probable tokens, O outcomes.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from durable import UserError
from wrinklefree.objectives.vocabulary import TokenLoss
from wrinklefree.teachers.base import NextTokens, TopK


class Divergence(StrEnum):
    """Whose probabilities weigh the difference."""

    forward = "forward"
    reverse = "reverse"
    adaptive = "adaptive"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How two distributions are compared."""

    wanted_by: str
    """The objective, for messages."""
    temperature: float = 1.0
    scale: float = 1.0
    """Factor of the result."""
    divergence: Divergence = Divergence.forward
    top_k: int | None = None
    confidence_k: int = 16

    def token_loss(self, next_tokens: NextTokens, vocab_size: int) -> TokenLoss:
        """With what a teacher of `vocab_size` tokens says of the same tokens."""

        def loss(logits_CS: Tensor, tokens: slice, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
            told = next_tokens(tokens)
            if isinstance(told, TopK) or (self.top_k is not None and self.top_k < vocab_size):
                total, gradient_CV = self._of_top_k(logits_CS[:, :vocab_size], told, gradient=gradient)
                return total, _widened(gradient_CV, logits_CS)
            return self.of_logits(logits_CS, told, gradient=gradient)

        return loss

    def of_logits(
        self, logits_CS: Tensor, teacher_CV: Tensor, *, gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Over the teacher's vocabulary: the sum, and its gradient in the student's logits."""
        vocab_size = teacher_CV.shape[1]
        log_student_CV = torch.log_softmax(logits_CS[:, :vocab_size] / self.temperature, dim=-1)
        log_teacher_CV = torch.log_softmax(teacher_CV.to(logits_CS.dtype) / self.temperature, dim=-1)
        kl_C, gradient_CV = self._kl(log_student_CV, log_teacher_CV)
        total = self.scale * kl_C.sum()
        if not gradient:
            return total, None
        return total, _widened(gradient_CV.mul_(self.scale / self.temperature), logits_CS)

    def _of_top_k(
        self, logits_CV: Tensor, told: Tensor | TopK, *, gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        ids_CK, log_teacher_CK, log_other_C = self._top_k(told, logits_CV.dtype)
        log_student_CV = torch.log_softmax(logits_CV / self.temperature, dim=-1)
        log_student_CK = log_student_CV.gather(1, ids_CK)
        # A place without a probability is no outcome: a list that ended early, or [MASK].
        is_one_CK = (log_teacher_CK != -torch.inf) & (log_student_CK != -torch.inf)
        is_listed_CV = torch.zeros_like(log_student_CV).scatter_add_(1, ids_CK, is_one_CK.to(logits_CV)) > 0
        log_rest_CV = log_student_CV.masked_fill_(is_listed_CV, -torch.inf)
        log_rest_C = log_rest_CV.logsumexp(1)
        is_one_CO = torch.cat([is_one_CK, (log_rest_C != -torch.inf)[:, None]], dim=1)
        log_student_CO = torch.cat([log_student_CK, log_rest_C[:, None]], dim=1)
        log_teacher_CO = torch.cat([log_teacher_CK, log_other_C[:, None]], dim=1)
        kl_C, gradient_CO = self._kl(
            log_student_CO.masked_fill_(~is_one_CO, -torch.inf),
            log_teacher_CO.masked_fill_(~is_one_CO, -torch.inf).log_softmax(-1),
        )
        total = self.scale * kl_C.sum()
        if not gradient:
            return total, None
        # The last outcome's share goes to its tokens as the student spreads it over them.
        log_rest_C.masked_fill_(~is_one_CO[:, -1], 0)
        gradient_CV = log_rest_CV.sub_(log_rest_C[:, None]).exp_().mul_(gradient_CO[:, -1:])
        gradient_CV.scatter_add_(1, ids_CK, gradient_CO[:, :-1])
        return total, gradient_CV.mul_(self.scale / self.temperature)

    def _top_k(self, told: Tensor | TopK, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and log probabilities of the K most probable tokens, and the log probability of all others."""
        if isinstance(told, Tensor):
            assert self.top_k is not None
            log_CV = torch.log_softmax(told.to(dtype) / self.temperature, dim=-1)
            log_CK, ids_CK = log_CV.topk(self.top_k, dim=-1)
            return ids_CK, log_CK, log_CV.scatter_(1, ids_CK, -torch.inf).logsumexp(1)
        if self.temperature != 1:
            raise UserError(
                f"objectives.{self.wanted_by}.temperature: this teacher tells its most probable tokens only, "
                "which cannot be softened",
                self.temperature,
                f"set objectives.{self.wanted_by}.temperature=1",
            )
        ids_CK, log_CK = told.ids, told.log_probs.to(dtype)
        if self.top_k is not None and self.top_k < ids_CK.shape[1]:
            log_CK, places_CK = log_CK.topk(self.top_k, dim=-1)
            ids_CK = ids_CK.gather(1, places_CK)
        return ids_CK, log_CK, (1 - log_CK.exp().sum(1)).clamp(min=0).log()

    def _kl(self, log_student_CO: Tensor, log_teacher_CO: Tensor) -> tuple[Tensor, Tensor]:
        """Of each token, and its gradient in the student's outcomes; both arguments are used up."""
        if self.divergence is Divergence.forward:
            return forward_kl(log_student_CO, log_teacher_CO)
        if self.divergence is Divergence.reverse:
            return reverse_kl(log_student_CO, log_teacher_CO)
        reverse_C = reverse_weight(log_teacher_CO, confidence_k=self.confidence_k)
        back_C, back_CO = reverse_kl(log_student_CO, log_teacher_CO)
        kl_C, gradient_CO = forward_kl(log_student_CO, log_teacher_CO)
        return torch.lerp(kl_C, back_C, reverse_C), gradient_CO.lerp_(back_CO, reverse_C[:, None])


def forward_kl(log_student_CO: Tensor, log_teacher_CO: Tensor) -> tuple[Tensor, Tensor]:
    """Σ p_T (log p_T − log p_S) of each token, and p_S − p_T; both arguments are used up."""
    probability_CO = log_teacher_CO.exp()
    # What the teacher rules out has log p = −∞, and 0 · −∞ is NaN.
    smallest = torch.finfo(log_teacher_CO.dtype).min
    log_teacher_CO.clamp_(min=smallest)
    log_student_CO.clamp_(min=smallest)
    kl_C = log_teacher_CO.sub_(log_student_CO).mul_(probability_CO).sum(1)
    return kl_C, log_student_CO.exp_().sub_(probability_CO)


def reverse_kl(log_student_CO: Tensor, log_teacher_CO: Tensor) -> tuple[Tensor, Tensor]:
    """Σ p_S (log p_S − log p_T) of each token over what the teacher holds possible, and its gradient."""
    log_CO = log_student_CO.masked_fill(log_teacher_CO == -torch.inf, -torch.inf).log_softmax(-1)
    student_CO = log_CO.exp()
    difference_CO = log_CO.sub_(log_teacher_CO).masked_fill_(student_CO == 0, 0)
    kl_C = (student_CO * difference_CO).sum(1)
    return kl_C, difference_CO.sub_(kl_C[:, None]).mul_(student_CO)


def reverse_weight(log_teacher_CO: Tensor, *, confidence_k: int) -> Tensor:
    """g: 1 where the teacher is sure of one token, 0 from an entropy of log k on."""
    entropy_C: Tensor = torch.special.entr(log_teacher_CO.exp()).sum(1)
    return (1 - entropy_C / math.log(confidence_k)).clamp(0, 1)


def _widened(gradient_CV: Tensor | None, logits_CS: Tensor) -> Tensor | None:
    """0 for the student's tokens beyond the teacher's vocabulary."""
    if gradient_CV is None or gradient_CV.shape == logits_CS.shape:
        return gradient_CV
    return F.pad(gradient_CV, (0, logits_CS.shape[1] - gradient_CV.shape[1]))
