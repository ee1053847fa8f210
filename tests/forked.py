"""`wrinklefree train`, forked from a process that has imported everything: a second each, not ten."""

import multiprocessing
import os
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["wrinklefree.run", "wrinklefree.commands.train", "transformers.models.llama"]
)


def start_training(
    overrides: list[str], log: Path, variables: Mapping[str, str] | None = None
) -> BaseProcess:
    """One process, in a session of its own, whose output is added to a file."""
    process = _CONTEXT.Process(target=_train, args=(overrides, log, dict(variables or {})))
    process.start()
    return process


def _train(overrides: list[str], log: Path, variables: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(variables)
    with log.open("ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    import torch

    from wrinklefree.cli import main

    torch.set_num_threads(1)
    main(["train", *overrides])
