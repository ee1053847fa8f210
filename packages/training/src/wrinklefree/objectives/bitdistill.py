"""BitDistill's two teachers' losses in one (arXiv 2510.13998): λ · L_LD + γ · L_AD.

`logits_distill` and `attention_distill` over the same tokens; cross entropy is an objective of its own. What
λ and γ are worth depends on whether τ² is there and on how relations are scaled, so presets name all of it:

    preset      λ     τ   τ²    γ     relations              from
    balanced    10    5   no    60    cosine                 ours: γ as a reproduction balanced it
    paper       10    5   no    1e5   paper                  the paper's equations, as they are printed
    summaries   1     5   no    1e3   paper                  the same, for summarization
    code        10    5   yes   1e5   code, 32 groups        the released code

γ = 1e5 is an artefact of `code`, whose relation loss is 1e-5; with the printed equation it drowns all else.
A key that is set goes before the preset's value.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from torch import Tensor

from bitnet_arch import ModelWalk
from data_handler import Batch
from wrinklefree.objectives.attention_distill import Relations, check_relations
from wrinklefree.objectives.base import Needs, ObjectiveConfig, is_number, require
from wrinklefree.objectives.divergence import Comparison
from wrinklefree.objectives.logits_distill import check_softening, taught_loss
from wrinklefree.objectives.relations import Normalization
from wrinklefree.objectives.states import States
from wrinklefree.objectives.vocabulary import Places, TokenLoss, VocabularyObjective


class BitDistillPreset(StrEnum):
    """Weights that were used together."""

    balanced = "balanced"
    paper = "paper"
    summaries = "summaries"
    code = "code"


PRESETS: dict[BitDistillPreset, dict[str, Any]] = {
    BitDistillPreset.balanced: {"gamma_attention": 60.0, "normalization": "cosine"},
    BitDistillPreset.paper: {"gamma_attention": 1e5, "normalization": "paper"},
    BitDistillPreset.summaries: {"lambda_logits": 1.0, "gamma_attention": 1e3, "normalization": "paper"},
    BitDistillPreset.code: {
        "scale_by_squared_temperature": True,
        "gamma_attention": 1e5,
        "normalization": "code",
        "split_heads": 32,
    },
}
COMMON: dict[str, Any] = {
    "lambda_logits": 10.0,
    "temperature": 5.0,
    "scale_by_squared_temperature": False,
    "split_heads": None,
}


@dataclass(kw_only=True, slots=True)
class BitDistillConfig(ObjectiveConfig):
    """How both losses count; none takes the preset's value."""

    name: ClassVar[str] = "bitdistill"

    preset: str = "balanced"
    """`balanced`, `paper`, `summaries` or `code`: what the keys below are where they are none."""
    lambda_logits: float | None = None
    """λ, the weight of the logits; above 0."""
    gamma_attention: float | None = None
    """γ, the weight of the relations; it belongs to `normalization`. With 0 they are not computed."""
    temperature: float | None = None
    """τ of the logits."""
    scale_by_squared_temperature: bool | None = None
    """Multiply the loss of the logits by τ²."""
    distill_layer: int = -1
    """The layer whose relations are compared, as in `attention_distill`."""
    normalization: str | None = None
    """How relations are scaled: `paper`, `cosine` or `code`, as in `attention_distill`."""
    split_heads: int | None = None
    """Groups of the channels, as in `attention_distill`."""

    def __post_init__(self) -> None:
        ObjectiveConfig.__post_init__(self)  # slots and a bare super() do not meet
        key = f"objectives.{self.name}"
        names = " or ".join(BitDistillPreset)
        require(self.preset in list(BitDistillPreset), f"{key}.preset", f"must be {names}", self.preset)
        values = self.values
        weight, gamma = values["lambda_logits"], values["gamma_attention"]
        positive = is_number(weight) and weight > 0
        require(positive, f"{key}.lambda_logits", "must be above 0; attention_distill does without", weight)
        require(is_number(gamma, at_least=0), f"{key}.gamma_attention", "must be 0 or more", gamma)
        check_softening(self.name, values["temperature"], values["scale_by_squared_temperature"])
        check_relations(
            self.name,
            distill_layer=self.distill_layer,
            normalization=values["normalization"],
            split_heads=values["split_heads"],
        )

    @property
    def values(self) -> dict[str, Any]:
        """What was set, and the preset's where nothing was."""
        preset = COMMON | PRESETS[BitDistillPreset(self.preset)]
        given = {name: getattr(self, name) for name in preset}
        return preset | {name: value for name, value in given.items() if value is not None}


class BitDistillObjective(VocabularyObjective):
    """λ · logits + γ · relations."""

    name = "bitdistill"

    def __init__(self, **options: Any) -> None:
        """The options of `BitDistillConfig`."""
        config = BitDistillConfig(**options)
        values = config.values
        temperature = values["temperature"]
        squared = temperature**2 if values["scale_by_squared_temperature"] else 1.0
        self.comparison = Comparison(
            wanted_by=self.name, temperature=temperature, scale=values["lambda_logits"] * squared
        )
        self.gamma = float(values["gamma_attention"])
        self.relations = Relations(
            wanted_by=self.name,
            distill_layer=config.distill_layer,
            normalization=Normalization(values["normalization"]),
            split_heads=values["split_heads"],
        )

    def needs(self) -> Needs:
        wanted = frozenset({self.relations.distill_layer}) if self.gamma else frozenset[int]()
        return Needs(teacher_logits=True, relations=wanted)

    def check_models(self, student: ModelWalk, teacher: ModelWalk) -> None:
        if self.gamma:
            self.relations.check_models(student, teacher)

    def token_loss(self, states: States, batch: Batch, places: Places) -> TokenLoss:
        return taught_loss(self.comparison, states, places)

    def beside(self, states: States, batch: Batch) -> Tensor | None:
        return self.gamma * self.relations.divergence(states, batch) if self.gamma else None
