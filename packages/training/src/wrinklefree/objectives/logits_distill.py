"""Distillation from a teacher's logits: KL(teacher ‖ student) of the token that follows, both softened by τ.

        Σ_v p_T (log p_T − log p_S),  p = softmax(z / τ)

Over the teacher's vocabulary and at the positions of continued pretraining. BitDistill (arXiv 2510.13998)
uses τ = 5 and states no τ²; its released code multiplies by it, which keeps the gradient's size when τ grows.
For ternary models and small budgets, τ = 1 with equal weights of this and cross entropy did best (ternary
Mamba, 2606.18114; see also EdgeRazor, 2605.04062): our default, where τ² makes no difference.

Shapes: B samples, T tokens, C tokens of a chunk, N tokens with a label, V the teacher's vocabulary,
S the student's.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from data_handler import Batch
from durable import ExitCode, UserError
from wrinklefree.objectives.base import Needs, ObjectiveConfig, is_number, require
from wrinklefree.objectives.states import States
from wrinklefree.objectives.vocabulary import Places, TokenLoss, VocabularyObjective


@dataclass(kw_only=True, slots=True)
class LogitsDistillConfig(ObjectiveConfig):
    """How a teacher's logits count."""

    name: ClassVar[str] = "logits_distill"

    temperature: float = 1.0
    """Both logits are divided by this; above 1 the teacher's small probabilities count more."""
    scale_by_squared_temperature: bool = True
    """Multiply by τ², as BitDistill's code does; its paper does not, so with its weight of 10 set false."""

    def __post_init__(self) -> None:
        ObjectiveConfig.__post_init__(self)  # slots and a bare super() do not meet
        positive = is_number(self.temperature) and self.temperature > 0
        key = "objectives.logits_distill"
        require(positive, f"{key}.temperature", "must be above 0", self.temperature)
        scale = self.scale_by_squared_temperature
        require(
            isinstance(scale, bool), f"{key}.scale_by_squared_temperature", "must be true or false", scale
        )


class LogitsDistillationObjective(VocabularyObjective):
    """KL from the teacher's distribution over the next token."""

    name = "logits_distill"

    def __init__(self, *, temperature: float = 1.0, scale_by_squared_temperature: bool = True) -> None:
        config = LogitsDistillConfig(
            temperature=temperature, scale_by_squared_temperature=scale_by_squared_temperature
        )
        self.temperature = config.temperature
        self.scale = config.temperature**2 if config.scale_by_squared_temperature else 1.0

    def needs(self) -> Needs:
        return Needs(teacher_logits=True)

    def token_loss(self, states: States, batch: Batch, places: Places) -> TokenLoss:
        teacher = states.teacher
        assert teacher is not None, "the manager brings a teacher where one is needed"
        check_vocabularies(states.student.vocab_size, teacher.vocab_size)
        next_tokens = teacher.next_tokens(places.before)

        def loss(logits_CS: Tensor, tokens: slice, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
            teacher_CV = next_tokens(tokens)
            assert isinstance(teacher_CV, Tensor)
            teacher_CV = teacher_CV.to(logits_CS.dtype)
            return softened_kl(
                logits_CS, teacher_CV, temperature=self.temperature, scale=self.scale, gradient=gradient
            )

        return loss


def check_vocabularies(student: int, teacher: int) -> None:
    """The student's may have more rows at its end, [MASK] for one; the teacher's distribution has no room
    for fewer.
    """
    if student < teacher:
        raise UserError(
            "objectives.logits_distill: the teacher's vocabulary is larger than the student's",
            found=f"{teacher} and {student}",
            fix="choose a teacher with the student's tokenizer and vocabulary size",
            exit_code=ExitCode.BAD_DATA,
        )


def softened_kl(
    logits_CS: Tensor, teacher_CV: Tensor, *, temperature: float, scale: float, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """scale · Σ p_T (log p_T − log p_S), and its gradient scale / τ · (p_S − p_T), 0 beyond the teacher's
    vocabulary.
    """
    vocab_size = teacher_CV.shape[1]
    log_student_CV = torch.log_softmax(logits_CS[:, :vocab_size] / temperature, dim=-1)
    log_teacher_CV = torch.log_softmax(teacher_CV / temperature, dim=-1)
    probability_CV = log_teacher_CV.exp()
    # A token that the teacher rules out has log p = −∞, and 0 · −∞ is NaN.
    smallest = torch.finfo(log_teacher_CV.dtype).min
    log_teacher_CV.clamp_(min=smallest)
    log_student_CV.clamp_(min=smallest)
    total = scale * log_teacher_CV.sub_(log_student_CV).mul_(probability_CV).sum()
    if not gradient:
        return total, None
    gradient_CV = log_student_CV.exp_().sub_(probability_CV).mul_(scale / temperature)
    extra = logits_CS.shape[1] - vocab_size
    return total, torch.nn.functional.pad(gradient_CV, (0, extra)) if extra else gradient_CV
