"""Objectives from what a configuration says of them, by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from durable import UserError
from wrinklefree.objectives.base import Objective, ObjectiveConfig, check_common
from wrinklefree.objectives.continue_pretrain import ContinuePretrainConfig, ContinuePretrainObjective
from wrinklefree.objectives.logits_distill import LogitsDistillationObjective, LogitsDistillConfig
from wrinklefree.objectives.manager import ObjectiveManager


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of objective: its configuration, and what makes it from there."""

    config: type[ObjectiveConfig]
    build: Callable[..., Objective]


AVAILABLE = {
    "continue_pretrain": Kind(ContinuePretrainConfig, ContinuePretrainObjective),
    "logits_distill": Kind(LogitsDistillConfig, LogitsDistillationObjective),
}
NAMES = (
    "continue_pretrain",
    "dlm",
    "layerwise",
    "logits_distill",
    "attention_distill",
    "bitdistill",
    "tcs_distill",
    "lrc_reconstruction",
)
"""All that configurations may name. One that cannot be computed yet is accepted where it is switched off."""
ALIASES = {"layerwise_distill": "layerwise"}
COMMON = ("enabled", "weight")


def create_objective_manager(specs: Mapping[str, Mapping[str, Any]]) -> ObjectiveManager:
    """From {name: {weight, …}}; what is disabled or has weight 0 is left out."""
    objectives: dict[str, Objective] = {}
    weights: dict[str, float] = {}
    names: set[str] = set()
    for given, options in specs.items():
        name = canonical_name(given)
        if name in names:
            raise UserError(f"objectives.{given}: the same objective twice", found=f"{given}, that is {name}")
        names.add(name)
        wanted = is_wanted(name, options)
        if not wanted and name not in AVAILABLE:
            continue
        objective = create_objective(name, options)
        if wanted:
            objectives[name], weights[name] = objective, options.get("weight", 1.0)
    return ObjectiveManager(objectives, weights)


def create_objective(name: str, options: Mapping[str, Any]) -> Objective:
    """One objective from its options."""
    name = canonical_name(name)
    if name not in AVAILABLE:
        raise UserError(
            f"objectives.{name}: objective {name} is not available yet",
            fix=f"set objectives.{name}.weight to 0, or use {' or '.join(AVAILABLE)}",
        )
    kind = AVAILABLE[name]
    known = [field.name for field in fields(kind.config)]
    for option in options:
        if option not in known:
            raise UserError(f"objectives.{name}: unknown key", found=option, choices=known)
    kind.config(**options)  # checks them
    return kind.build(**{key: value for key, value in options.items() if key not in COMMON})


def canonical_name(name: str) -> str:
    """The name that an objective has here."""
    name = ALIASES.get(name, name)
    if name not in NAMES:
        raise UserError("objectives: unknown objective", found=name, choices=NAMES)
    return name


def is_wanted(name: str, options: Mapping[str, Any]) -> bool:
    """Neither disabled nor of weight 0; both keys are checked in an objective that is switched off, too."""
    enabled, weight = options.get("enabled", True), options.get("weight", 1.0)
    check_common(name, enabled=enabled, weight=weight)
    return bool(enabled and weight)
