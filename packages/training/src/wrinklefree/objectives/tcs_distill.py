"""What a next-token teacher says of masked tokens: distillation for block diffusion, under the name that the
earlier system gave it.

        Σ_masked KL( p_T(· | x_<i) ‖ p_S(· | clean blocks before, own block of x_t) )   top k and the rest

It is *not* the target concrete score (TCSM, 2504.16431; distilled diffusion, OpenReview xfw92pDy2u). That one
weighs every candidate for a masked token by the teacher's probability of the whole text with it, so that the
tokens to the right count, and asks for k forwards of the teacher. This takes the teacher's distribution over
the next token as it is and ignores the right context: distillation of logits at masked tokens.

Token i is predicted by the student's hidden state at i − 1 of the masked view, and by the teacher at i − 1 of
the clean text: at i the teacher would have read the answer.
"""

from dataclasses import dataclass
from typing import ClassVar

from data_handler import Batch
from wrinklefree.objectives.base import Needs, ObjectiveConfig
from wrinklefree.objectives.divergence import Comparison
from wrinklefree.objectives.dlm import masked_count
from wrinklefree.objectives.logits_distill import check_softening, check_top_k, taught_loss
from wrinklefree.objectives.states import States
from wrinklefree.objectives.views import ViewPlan
from wrinklefree.objectives.vocabulary import Places, TokenLoss, VocabularyObjective


@dataclass(kw_only=True, slots=True)
class TCSDistillConfig(ObjectiveConfig):
    """How the teacher of masked tokens counts; what is masked is said in `training.diffusion`."""

    name: ClassVar[str] = "tcs_distill"

    temperature: float = 1.0
    """Both logits are divided by this; the earlier system took 5."""
    scale_by_squared_temperature: bool = True
    """Multiply by τ², which keeps the gradient's size when τ grows."""
    top_k: int | None = 100
    """Compare the teacher's k most probable tokens and the mass of all others; none takes every token."""

    def __post_init__(self) -> None:
        ObjectiveConfig.__post_init__(self)  # slots and a bare super() do not meet
        check_softening(self.name, self.temperature, self.scale_by_squared_temperature)
        check_top_k(self.name, self.top_k)


class TCSDistillationObjective(VocabularyObjective):
    """KL from the teacher's distribution over what is under each mask."""

    name = "tcs_distill"
    of_masked = True

    def __init__(
        self,
        *,
        plan: ViewPlan,
        temperature: float = 1.0,
        scale_by_squared_temperature: bool = True,
        top_k: int | None = 100,
    ) -> None:
        config = TCSDistillConfig(
            temperature=temperature, scale_by_squared_temperature=scale_by_squared_temperature, top_k=top_k
        )
        self.plan = plan
        self.comparison = Comparison(
            wanted_by=self.name,
            temperature=config.temperature,
            scale=config.temperature**2 if config.scale_by_squared_temperature else 1.0,
            top_k=config.top_k,
        )

    def needs(self) -> Needs:
        return Needs(teacher_logits=True, masked_views=True)

    def count(self, batch: Batch) -> int:
        return masked_count(self.plan, batch, expected=False)

    def token_loss(self, states: States, batch: Batch, places: Places) -> TokenLoss:
        return taught_loss(self.comparison, states, places)
