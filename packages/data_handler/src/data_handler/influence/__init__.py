"""Influence: which examples and sources help a probe, and mixture weights that follow it.

Names are imported on first use: the command line's help needs none of them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_handler.influence.config import InfluenceConfig, InfluenceTarget, MixtureOptimizationConfig
    from data_handler.influence.datainf import DataInfCalculator, create_influence_calculator
    from data_handler.influence.optimizer import InfluenceAwareOptimizer
    from data_handler.influence.reweight import MixtureWeightCalculator
    from data_handler.influence.self_boosting import SelfBoostingFilter
    from data_handler.influence.tracker import InfluenceTracker

_HOMES = {
    "DataInfCalculator": "datainf",
    "InfluenceAwareOptimizer": "optimizer",
    "InfluenceConfig": "config",
    "InfluenceTarget": "config",
    "InfluenceTracker": "tracker",
    "MixtureOptimizationConfig": "config",
    "MixtureWeightCalculator": "reweight",
    "SelfBoostingFilter": "self_boosting",
    "create_influence_calculator": "datainf",
}
__all__ = [
    "DataInfCalculator",
    "InfluenceAwareOptimizer",
    "InfluenceConfig",
    "InfluenceTarget",
    "InfluenceTracker",
    "MixtureOptimizationConfig",
    "MixtureWeightCalculator",
    "SelfBoostingFilter",
    "create_influence_calculator",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
