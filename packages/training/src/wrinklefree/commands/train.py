"""`wrinklefree train`: compose the configuration, run it, leave with its exit code."""

import logging
import os

from wrinklefree.config import load_config, to_yaml


def train(overrides: list[str], *, print_config: bool = False) -> int:
    """The exit code of the run."""
    config = load_config(overrides)
    if print_config:
        print(to_yaml(config), end="")
        return 0
    # One voice among several ranks.
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s")
    for name in ("httpx", "fsspec", "datasets", "torch", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from wrinklefree.run import run

    return run(config).exit_code
