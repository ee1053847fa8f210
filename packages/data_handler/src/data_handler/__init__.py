"""Training data whose order is a function of a seed: prepared once, mixed, packed and weighed.

    prepare ─► Shards ─► MixtureSchedule ─► TrainingLoader ─► Batch
                  └────► Probe ─► influence: which source helps

Names are imported on first use, so that `--help` answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_handler.config import DataConfig, SourceConfig, list_available_configs, load_data_config
    from data_handler.loaders import TrainingLoader
    from data_handler.masks import attention_mask
    from data_handler.mixture import MixtureSchedule
    from data_handler.probes import Probe, require_disjoint
    from data_handler.shards import Shards
    from data_handler.types import Batch

__version__ = "0.1.0"
_HOMES = {
    "Batch": "types",
    "DataConfig": "config",
    "MixtureSchedule": "mixture",
    "Probe": "probes",
    "Shards": "shards",
    "SourceConfig": "config",
    "TrainingLoader": "loaders",
    "attention_mask": "masks",
    "list_available_configs": "config",
    "load_data_config": "config",
    "require_disjoint": "probes",
}
__all__ = [
    "Batch",
    "DataConfig",
    "MixtureSchedule",
    "Probe",
    "Shards",
    "SourceConfig",
    "TrainingLoader",
    "attention_mask",
    "list_available_configs",
    "load_data_config",
    "require_disjoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
