"""Where a run lives, and which of its checkpoints it goes on from.

{output_dir}/checkpoints/{experiment_name}/{stage}_checkpoint/
    config.yaml  metrics.jsonl  metrics.csv  .lock
    checkpoints/step_000500/ …  checkpoints/final/
"""

import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from durable import (
    ExitCode,
    UserError,
    lock,
    newest_complete,
    read_manifest,
    recover,
    verify,
    withdraw,
)
from wrinklefree.config.schema import RunConfig, Stage
from wrinklefree.training.fetching import PICKLES, fetched, padded_step, pickle_refused

logger = logging.getLogger(__name__)
FINAL = "final"
BEST = "best"
"""The checkpoint with the smallest validation loss; a run never goes on from it by itself."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The directory of one run."""

    path: Path

    @classmethod
    def of(cls, config: RunConfig) -> "RunDirectory":
        experiment = Path(config.output_dir) / "checkpoints" / config.experiment_name
        return cls(experiment / f"{config.training.stage.value}_checkpoint")

    def of_stage(self, stage: Stage) -> "RunDirectory":
        """The same experiment's directory of another stage."""
        return RunDirectory(self.path.with_name(f"{stage.value}_checkpoint"))

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make it, see that it can be written, and keep other runs out; UserError (exit codes 5 and 3)."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe = self.checkpoints / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"output_dir: {self.path} cannot be written",
                error.strerror,
                "choose another output_dir, or change its permissions",
                ExitCode.CANNOT_WRITE,
            ) from None
        with lock(self.path):
            recover(self.checkpoints)
            yield

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies; says which it skipped. UserError (4) when none does."""
        found = newest_complete(self.checkpoints, ignore=(BEST,)).or_raise()
        for skipped in found.skipped:
            logger.warning("skipped a damaged checkpoint: %s", skipped.reason)
            if found.path is not None:
                logger.warning("using the one before it: %s", found.path)
        return found.path

    def forget_old(self, keep_last_n: int, *, newest: Path, waiting: Collection[Path] = ()) -> None:
        """Remove step checkpoints beyond the newest `keep_last_n` but for those that somebody waits for; only
        after the newest verified.
        """
        verify(newest)
        steps = sorted(path for path in self.checkpoints.glob("step_*") if path.name[5:].isdigit())
        older = [path for path in steps if path.name <= newest.name]
        for path in older[:-keep_last_n]:
            if path not in waiting:
                try:
                    withdraw(path)
                except OSError as error:
                    logger.warning("%s: an old checkpoint cannot be removed (%s)", path, error.strerror)


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint was written after."""
    return int(str(read_manifest(checkpoint).metadata["step"]))


def find_checkpoint(path: str, *, key: str = "training.resume.checkpoint_path") -> Path:
    """The checkpoint that a person named: its directory, a file in it, or a directory of several.

    What lies at an address is copied here first. `key` is what the person wrote it for.
    """
    if "://" in path:
        return fetched(path, key=key, ignore=(BEST,))
    given = Path(path).expanduser()
    if given.suffix in PICKLES:
        if given.is_file():
            raise pickle_refused(given)
        given = given.parent
    if not given.is_dir():
        given = given.with_name(padded_step(given.name)) if given.name else given
    if not given.is_dir():
        raise UserError(
            f"{key}: no such directory", path, "name the directory of a checkpoint", ExitCode.BAD_DATA
        )
    if (given / "manifest.json").is_file():
        verify(given)
        return given
    folder = given / "checkpoints" if (given / "checkpoints").is_dir() else given
    newest = newest_complete(folder, ignore=(BEST,)).or_raise().path
    if newest is None:
        raise UserError(f"{key}: holds no checkpoint", path, exit_code=ExitCode.BAD_DATA)
    return newest
