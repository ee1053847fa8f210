"""Find the newest directory that is whole, and say which newer ones are not.

Newest means: the largest step. It stands in the name (`step_000500`, `checkpoint-500`) or else in the
manifest's metadata (`{"step": 500}`, for `final/`); at equal steps the one published later wins.
Directories without any step come after those with one, latest first. What has neither a step nor a readable
manifest could be anything, perhaps the newest, so it is looked at first: it is reported, never passed over
in silence.
"""

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from durable.errors import ExitCode, UserError
from durable.leftovers import restore
from durable.manifest import MANIFEST_NAME, Manifest, read_manifest
from durable.verify import verify

_STEP_IN_NAME = re.compile(r"(?:^|[_-])(?:step|checkpoint)[=_-]?(\d{1,18})$", re.IGNORECASE)
_NOT_OURS = {"lost+found"}


@dataclass(frozen=True, slots=True)
class Skipped:
    """A directory that was passed over."""

    path: Path
    reason: str
    """Names the file and says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest directory that verifies, or None, and what looked newer but did not."""

    path: Path | None
    manifest: Manifest | None
    skipped: tuple[Skipped, ...] = ()

    def or_raise(self) -> Self:
        """Itself; UserError (exit code 4) when something was published and nothing verifies."""
        if self.path is None and self.skipped:
            first = self.skipped[0]
            raise UserError(
                f"{first.path.parent}: holds nothing that verifies",
                found=f"{len(self.skipped)} damaged or unfinished, first {first.reason}",
                fix="restore one from a copy, or start in an empty directory",
                exit_code=ExitCode.BAD_DATA,
            )
        return self


def newest_complete(parent: str | os.PathLike[str], *, ignore: Collection[str] = ()) -> Newest:
    """The newest published directory in `parent` that verifies; nothing found nor skipped: there was none.

    Names in `ignore` are as good as not there. Hashing ends with the first that verifies. What an interrupted
    replacement set aside is put back first.
    """
    root = Path(parent)
    if not os.path.lexists(root):
        return Newest(None, None)
    try:
        restore(root)
        candidates = sorted(
            (entry for entry in root.iterdir() if entry.name not in ignore and _is_candidate(entry)), key=_age
        )
    except OSError as error:
        raise UserError(f"{root}: cannot be listed", error.strerror, exit_code=ExitCode.BAD_DATA) from error
    skipped: list[Skipped] = []
    for path in candidates:
        try:
            return Newest(path, verify(path), tuple(skipped))
        except UserError as error:
            skipped.append(Skipped(path, error.problem))
    return Newest(None, None, tuple(skipped))


def _is_candidate(path: Path) -> bool:
    """Any visible directory, and what is named like a step; a link to a neighbour only repeats it."""
    if path.name.startswith(".") or path.name in _NOT_OURS:
        return False
    if path.is_symlink() and path.resolve().parent == path.parent.resolve():
        return False
    return path.is_dir() or _step_in_name(path) is not None


def _age(path: Path) -> tuple[int, int, int, str]:
    """Sorts the newest first."""
    step = _step_in_name(path)
    if step is None:
        try:
            step = _step_in_metadata(read_manifest(path))
        except UserError:
            return 0, 0, 0, path.name
    age = -_published_at(path)
    return (2, 0, age, path.name) if step is None else (1, -step, age, path.name)


def _step_in_name(path: Path) -> int | None:
    match = _STEP_IN_NAME.search(path.name)
    return int(match[1]) if match else None


def _step_in_metadata(manifest: Manifest) -> int | None:
    step = manifest.metadata.get("step")
    return step if type(step) is int else None


def _published_at(path: Path) -> int:
    try:
        return (path / MANIFEST_NAME).stat().st_mtime_ns
    except OSError:
        return 0
