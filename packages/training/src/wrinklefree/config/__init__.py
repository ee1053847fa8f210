"""The configuration of a run: its schema, and the one way to load it."""

from wrinklefree.config.loading import CONFIG_DIR, group_options, load_config, schema_keys, to_dict, to_yaml
from wrinklefree.config.schema import RunConfig

__all__ = [
    "CONFIG_DIR",
    "RunConfig",
    "group_options",
    "load_config",
    "schema_keys",
    "to_dict",
    "to_yaml",
]
