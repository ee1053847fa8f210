"""`wrinklefree train`: compose the configuration, run it, leave with its exit code."""

import logging
import os
import sys
from typing import TextIO

from wrinklefree.config import load_config, to_yaml
from wrinklefree.masking import MaskingFormatter


def train(overrides: list[str], *, print_config: bool = False, dry_run: bool = False) -> int:
    """The exit code of the run."""
    config = load_config(overrides)
    if print_config:
        print(to_yaml(config), end="")
        return 0
    _log_to_stderr()
    if dry_run:
        from wrinklefree.commands.dry_run import dry_run as estimate

        estimate(config)
        return 0
    from wrinklefree.run import run

    return run(config).exit_code


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes where stderr is at that moment: a live line redirects it, to stay the last one."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _log_to_stderr() -> None:
    """One voice among several ranks, and no secret in it."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    handler = StderrHandler()
    handler.setFormatter(MaskingFormatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    for name in ("httpx", "fsspec", "datasets", "torch", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.WARNING)
