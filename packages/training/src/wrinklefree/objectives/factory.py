"""Objectives from what a configuration says of them, by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from durable import UserError
from wrinklefree.objectives.attention_distill import (
    AttentionDistillConfig,
    AttentionRelationDistillationObjective,
)
from wrinklefree.objectives.base import Objective, ObjectiveConfig, check_common
from wrinklefree.objectives.bitdistill import BitDistillConfig, BitDistillObjective
from wrinklefree.objectives.continue_pretrain import ContinuePretrainConfig, ContinuePretrainObjective
from wrinklefree.objectives.curriculum import CurriculumConfig, CurriculumPhase, CurriculumScheduler
from wrinklefree.objectives.diffusion import DiffusionConfig
from wrinklefree.objectives.dlm import DLMConfig, DLMObjective
from wrinklefree.objectives.layerwise import LayerwiseConfig, LayerwiseDistillationObjective
from wrinklefree.objectives.logits_distill import LogitsDistillationObjective, LogitsDistillConfig
from wrinklefree.objectives.lrc_reconstruction import LRCReconstructionConfig, LRCReconstructionObjective
from wrinklefree.objectives.manager import ObjectiveManager, require_a_weight
from wrinklefree.objectives.tcs_distill import TCSDistillationObjective, TCSDistillConfig
from wrinklefree.objectives.views import ViewPlan


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of objective: its configuration, and what makes it from there."""

    config: type[ObjectiveConfig]
    build: Callable[..., Objective]
    has_plan: bool = False
    """Is it about masked tokens?"""


KINDS = {
    "continue_pretrain": Kind(ContinuePretrainConfig, ContinuePretrainObjective),
    "dlm": Kind(DLMConfig, DLMObjective, has_plan=True),
    "logits_distill": Kind(LogitsDistillConfig, LogitsDistillationObjective),
    "attention_distill": Kind(AttentionDistillConfig, AttentionRelationDistillationObjective),
    "bitdistill": Kind(BitDistillConfig, BitDistillObjective),
    "layerwise": Kind(LayerwiseConfig, LayerwiseDistillationObjective),
    "lrc_reconstruction": Kind(LRCReconstructionConfig, LRCReconstructionObjective),
    "tcs_distill": Kind(TCSDistillConfig, TCSDistillationObjective, has_plan=True),
}
ALIASES = {"layerwise_distill": "layerwise"}
COMMON = ("enabled", "weight")


def create_objective_manager(
    specs: Mapping[str, Mapping[str, Any]],
    curriculum: CurriculumScheduler | None = None,
    *,
    diffusion: DiffusionConfig | None = None,
    seed: int = 0,
) -> ObjectiveManager:
    """From {name: {weight, …}}; what is disabled or never has a weight above 0 is left out.

    A curriculum's weights stand for those of the objectives. Masks are drawn from `seed`.
    """
    wanted = checked_objectives(specs, curriculum)
    plan = (diffusion or DiffusionConfig()).plan(seed)
    objectives = {name: create_objective(name, options, plan=plan) for name, options in wanted.items()}
    weights = {name: options.get("weight", 1.0) for name, options in wanted.items()}
    if curriculum is not None:
        weights = {name: curriculum.weights(1)[name] for name in wanted}
    return ObjectiveManager(objectives, weights, plan=plan)


def checked_objectives(
    specs: Mapping[str, Any], curriculum: CurriculumScheduler | None = None
) -> dict[str, Mapping[str, Any]]:
    """The options of those that are wanted, by the names they have here; UserError for what does not hold."""
    described: dict[str, Mapping[str, Any]] = {}
    for given, options in specs.items():
        name = canonical_name(given)
        if name in described:
            raise UserError(f"objectives.{given}: the same objective twice", found=f"{given}, that is {name}")
        if not isinstance(options, Mapping):
            raise UserError(f"objectives.{given}: is no table", options, "give {weight: NUMBER}")
        _check_options(name, options)
        described[name] = options
    wanted = {name: options for name, options in described.items() if is_wanted(name, options)}
    if curriculum is not None:
        return _of_curriculum(curriculum, described)
    require_a_weight(wanted, described)
    return wanted


def create_curriculum_scheduler(config: CurriculumConfig, total_steps: int) -> CurriculumScheduler | None:
    """None unless it is enabled."""
    if not config.enabled:
        return None
    phases = [
        CurriculumPhase(
            phase.name or f"phase {number}",
            phase.until,
            {canonical_name(name): weight for name, weight in phase.objectives.items()},
            phase.data,
        )
        for number, phase in enumerate(config.phases, start=1)
    ]
    return CurriculumScheduler(phases, total_steps, config.interpolation)


def _of_curriculum(
    curriculum: CurriculumScheduler, described: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """The options of all that have a weight above 0 in some phase."""
    wanted = {}
    for phase in curriculum.phases:
        for name in (name for name, weight in phase.objective_weights.items() if weight > 0):
            if name not in described:
                raise UserError(
                    f"training.curriculum: {phase.name}: not among training.objectives",
                    name,
                    choices=described,
                )
            if not described[name].get("enabled", True):
                raise UserError(
                    f"training.curriculum: {phase.name}: {name} is switched off",
                    "enabled: false",
                    f"set training.objectives.{name}.enabled=true",
                )
            wanted[name] = described[name]
    return wanted


def create_objective(name: str, options: Mapping[str, Any], *, plan: ViewPlan | None = None) -> Objective:
    """One objective from its options; `plan` says what those on masked tokens are about."""
    name = canonical_name(name)
    _check_options(name, options)
    kind = KINDS[name]
    given = {key: value for key, value in options.items() if key not in COMMON}
    if kind.has_plan:
        given["plan"] = plan or DiffusionConfig().plan(seed=0)
    return kind.build(**given)


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    config = KINDS[name].config
    known = [field.name for field in fields(config)]
    for option in options:
        if option not in known:
            raise UserError(f"objectives.{name}: unknown key", found=option, choices=known)
    config(**options)  # checks them


def canonical_name(name: str) -> str:
    """The name that an objective has here."""
    name = ALIASES.get(name, name)
    if name not in KINDS:
        raise UserError("objectives: unknown objective", found=name, choices=KINDS)
    return name


def is_wanted(name: str, options: Mapping[str, Any]) -> bool:
    """Neither disabled nor of weight 0; both keys are checked in an objective that is switched off, too."""
    enabled, weight = options.get("enabled", True), options.get("weight", 1.0)
    check_common(name, enabled=enabled, weight=weight)
    return bool(enabled and weight)
