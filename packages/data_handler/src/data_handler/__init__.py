"""Training data whose order is a function of a seed: prepared once, mixed, packed and weighed.

    prepare ─► Shards ─► MixtureSchedule ─► TrainingLoader ─► Batch
                  └────► Probe ─► influence: which source helps

Names are imported on first use, so that `--help` answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_handler.config import (
        DataConfig,
        SourceConfig,
        get_config_path,
        list_available_configs,
        load_data_config,
    )
    from data_handler.dataloaders import (
        DomainProbeConfig,
        DomainProbeDataset,
        create_dataloader,
        create_domain_probe_loaders,
        create_mixed_dataloader,
        create_pretraining_dataloader,
    )
    from data_handler.loaders import TrainingLoader
    from data_handler.masks import attention_mask
    from data_handler.mixed import DatasetMixture, MixedDataset, create_mixed_dataset
    from data_handler.mixture import MixtureSchedule
    from data_handler.packer import PackedDataset, TokenPacker
    from data_handler.probes import Probe, require_disjoint
    from data_handler.shards import Shards
    from data_handler.types import Batch

__version__ = "0.1.0"
_HOMES = {
    "Batch": "types",
    "DataConfig": "config",
    "DatasetMixture": "mixed",
    "DomainProbeConfig": "dataloaders",
    "DomainProbeDataset": "dataloaders",
    "MixedDataset": "mixed",
    "MixtureSchedule": "mixture",
    "PackedDataset": "packer",
    "Probe": "probes",
    "Shards": "shards",
    "SourceConfig": "config",
    "TokenPacker": "packer",
    "TrainingLoader": "loaders",
    "attention_mask": "masks",
    "create_dataloader": "dataloaders",
    "create_domain_probe_loaders": "dataloaders",
    "create_mixed_dataloader": "dataloaders",
    "create_mixed_dataset": "mixed",
    "create_pretraining_dataloader": "dataloaders",
    "get_config_path": "config",
    "list_available_configs": "config",
    "load_data_config": "config",
    "require_disjoint": "probes",
}
__all__ = [
    "Batch",
    "DataConfig",
    "DatasetMixture",
    "DomainProbeConfig",
    "DomainProbeDataset",
    "MixedDataset",
    "MixtureSchedule",
    "PackedDataset",
    "Probe",
    "Shards",
    "SourceConfig",
    "TokenPacker",
    "TrainingLoader",
    "attention_mask",
    "create_dataloader",
    "create_domain_probe_loaders",
    "create_mixed_dataloader",
    "create_mixed_dataset",
    "create_pretraining_dataloader",
    "get_config_path",
    "list_available_configs",
    "load_data_config",
    "require_disjoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
