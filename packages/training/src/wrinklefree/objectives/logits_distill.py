"""Distillation from a teacher's logits: KL between both distributions over the token that follows.

        Σ_v p_T (log p_T − log p_S),  p = softmax(z / τ)

Over the teacher's vocabulary and at the positions of continued pretraining. BitDistill (arXiv 2510.13998)
uses τ = 5 and states no τ²; its released code multiplies by it, which keeps the gradient's size when τ grows.
For ternary models and small budgets, τ = 1 with equal weights of this and cross entropy did best (ternary
Mamba, 2606.18114; see also EdgeRazor, 2605.04062): our default, where τ² makes no difference.
`divergence.py` has the other directions and the top k.
"""

from dataclasses import dataclass
from typing import ClassVar

from data_handler import Batch
from durable import ExitCode, UserError
from wrinklefree.objectives.base import Needs, ObjectiveConfig, is_count, is_number, require
from wrinklefree.objectives.divergence import Comparison, Divergence
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
    divergence: str = "forward"
    """`forward` KL(T ‖ S), `reverse` KL(S ‖ T), `adaptive` between them by the teacher's entropy."""
    confidence_k: int = 16
    """`adaptive` is all forward from an entropy of log k on."""
    top_k: int | None = None
    """Compare the teacher's k most probable tokens and the mass of all others; none takes every token."""

    def __post_init__(self) -> None:
        ObjectiveConfig.__post_init__(self)  # slots and a bare super() do not meet
        check_softening(self.name, self.temperature, self.scale_by_squared_temperature)
        key, k = f"objectives.{self.name}", self.confidence_k
        names = " or ".join(Divergence)
        known = self.divergence in list(Divergence)
        require(known, f"{key}.divergence", f"must be {names}", self.divergence)
        require(is_count(k, at_least=2), f"{key}.confidence_k", "must be 2 or more", k)
        check_top_k(self.name, self.top_k)


def check_softening(name: str, temperature: object, scale_by_squared_temperature: object) -> None:
    """What all have that compare softened logits."""
    key = f"objectives.{name}"
    positive = is_number(temperature) and float(temperature) > 0  # type: ignore[arg-type]
    require(positive, f"{key}.temperature", "must be above 0", temperature)
    scale = scale_by_squared_temperature
    require(isinstance(scale, bool), f"{key}.scale_by_squared_temperature", "must be true or false", scale)


def check_top_k(name: str, top_k: object) -> None:
    """A count, or none."""
    holds = top_k is None or is_count(top_k, at_least=1)
    require(holds, f"objectives.{name}.top_k", "must be 1 or more, or none", top_k)


class LogitsDistillationObjective(VocabularyObjective):
    """KL from the teacher's distribution over the next token."""

    name = "logits_distill"

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        scale_by_squared_temperature: bool = True,
        divergence: str = "forward",
        confidence_k: int = 16,
        top_k: int | None = None,
    ) -> None:
        config = LogitsDistillConfig(
            temperature=temperature,
            scale_by_squared_temperature=scale_by_squared_temperature,
            divergence=divergence,
            confidence_k=confidence_k,
            top_k=top_k,
        )
        self.comparison = Comparison(
            wanted_by=self.name,
            temperature=config.temperature,
            scale=config.temperature**2 if config.scale_by_squared_temperature else 1.0,
            divergence=Divergence(config.divergence),
            confidence_k=config.confidence_k,
            top_k=config.top_k,
        )

    def needs(self) -> Needs:
        return Needs(teacher_logits=True)

    def token_loss(self, states: States, batch: Batch, places: Places) -> TokenLoss:
        return taught_loss(self.comparison, states, places)


def taught_loss(comparison: Comparison, states: States, places: Places) -> TokenLoss:
    """What the teacher says of the tokens at these places, from the clean token before each."""
    teacher = states.teacher
    assert teacher is not None, "the manager brings a teacher where one is needed"
    check_vocabularies(comparison.wanted_by, states.student.vocab_size, teacher.vocab_size)
    return comparison.token_loss(teacher.next_tokens(places.before), teacher.vocab_size)


def check_vocabularies(name: str, student: int, teacher: int) -> None:
    """The student's may have more rows at its end, [MASK] for one; the teacher's distribution has no room
    for fewer.
    """
    if student < teacher:
        raise UserError(
            f"objectives.{name}: the teacher's vocabulary is larger than the student's",
            found=f"{teacher} and {student}",
            fix="choose a teacher with the student's tokenizer and vocabulary size",
            exit_code=ExitCode.BAD_DATA,
        )
