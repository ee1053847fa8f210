"""Where a run lives, and which of its checkpoints it goes on from.

{output_dir}/checkpoints/{experiment_name}/{stage}_checkpoint/
    config.yaml  metrics.jsonl  metrics.csv  .lock
    checkpoints/step_000500/ …  checkpoints/final/
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from durable import ExitCode, UserError, lock, newest_complete, read_manifest, recover, verify
from wrinklefree.config.schema import RunConfig

logger = logging.getLogger(__name__)
FINAL = "final"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The directory of one run."""

    path: Path

    @classmethod
    def of(cls, config: RunConfig) -> "RunDirectory":
        stage = f"{config.training.stage.value}_checkpoint"
        return cls(Path(config.output_dir) / "checkpoints" / config.experiment_name / stage)

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
        found = newest_complete(self.checkpoints).or_raise()
        for skipped in found.skipped:
            logger.warning("skipped a damaged checkpoint: %s", skipped.reason)
            if found.path is not None:
                logger.warning("using the one before it: %s", found.path)
        return found.path

    def forget_old(self, keep_last_n: int, *, newest: Path) -> None:
        """Remove step checkpoints beyond the newest `keep_last_n`; only after the newest verified."""
        verify(newest)
        steps = sorted(path for path in self.checkpoints.glob("step_*") if path.name[5:].isdigit())
        older = [path for path in steps if path.name <= newest.name]
        for path in older[:-keep_last_n]:
            shutil.rmtree(path)


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint was written after."""
    return int(str(read_manifest(checkpoint).metadata["step"]))


def find_checkpoint(path: str) -> Path:
    """The checkpoint that a person named: its directory, a file in it, or a directory of several."""
    given = Path(path).expanduser()
    if "://" in path:
        raise UserError(
            "training.resume.checkpoint_path: remote checkpoints are not fetched", path, "copy it here first"
        )
    if given.suffix in (".pt", ".ckpt", ".bin", ".pth"):
        if given.is_file():
            raise UserError(
                f"{given}: a pickle is refused, since opening it runs whatever code is inside",
                fix="name the directory of a checkpoint",
                exit_code=ExitCode.BAD_DATA,
            )
        given = given.parent
    if not given.is_dir() and (short := _with_padded_step(given)) is not None:
        given = short
    if not given.is_dir():
        raise UserError(
            "training.resume.checkpoint_path: no such directory",
            path,
            "name the directory of a checkpoint",
            ExitCode.BAD_DATA,
        )
    if (given / "manifest.json").is_file():
        verify(given)
        return given
    folder = given / "checkpoints" if (given / "checkpoints").is_dir() else given
    newest = newest_complete(folder).or_raise().path
    if newest is None:
        raise UserError(
            "training.resume.checkpoint_path: holds no checkpoint", path, exit_code=ExitCode.BAD_DATA
        )
    return newest


def _with_padded_step(path: Path) -> Path | None:
    """`step_5000` means `step_005000`."""
    name, _, number = path.name.rpartition("_")
    if name != "step" or not number.isdigit():
        return None
    padded = path.with_name(f"step_{int(number):06d}")
    return padded if padded.is_dir() else None
