"""Temporaries beside their target, and what dead writers left of them.

    .step_000500.tmp-1a2b3c4d-4321-9f86d081    being written; after an exchange, the replaced version
    .step_000500.old-1a2b3c4d-4321-9f86d081    the replaced version, where the filesystem has no exchange

The name says host (a digest of it), process and a random number. A leftover goes when nobody can still be
writing it: same host, process gone, and no flock on it. The lock is what tells containers apart that share
a host's name and all run as process 1. Leftovers of other hosts stay, unless the caller holds the lock of
the run and says so.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from durable.syncing import sync_directory

logger = logging.getLogger(__name__)

_NAME = re.compile(r"\.(?P<target>.+)\.(?P<kind>tmp|old)-(?P<host>[0-9a-f]{8})-(?P<pid>\d{1,10})-[0-9a-f]{8}")
_ours: set[str] = set()
"""What this process is writing now. Anything else of its process number was left by a former one."""


def new_directory(target: Path) -> tuple[Path, int]:
    """An empty directory beside `target` to write its next version in, and a descriptor that locks it."""
    path = _new_name(target)
    with _or_discard(path, target):
        path.mkdir()
        return path, _locked(os.open(path, os.O_RDONLY | os.O_DIRECTORY))


def new_file(target: Path) -> tuple[Path, int]:
    """The same for a single file."""
    path = _new_name(target)
    with _or_discard(path, target):
        return path, _locked(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))


def aside_name(temporary: Path) -> Path:
    """Where the previous version waits while `temporary` takes its name."""
    head, _, tail = temporary.name.rpartition(".tmp-")
    return temporary.with_name(f"{head}.old-{tail}")


def discard(temporary: Path, target: Path) -> None:
    """Remove what a finished or failed writer has left, after putting back a version that is still aside."""
    aside = aside_name(temporary)
    try:
        if os.path.lexists(aside) and not os.path.lexists(target):
            aside.rename(target)
        for path in filter(os.path.lexists, (aside, temporary)):
            _remove(path)
    except OSError as error:
        logger.warning("%s: cannot be cleaned up now, the next writer will try (%s)", temporary, error)
    finally:
        _ours.discard(temporary.name)


def withdraw(target: str | os.PathLike[str]) -> None:
    """Remove what was published: whenever the process dies, it is there whole or not at all."""
    path = Path(target)
    aside = _new_name(path)
    try:
        path.rename(aside)
        _remove(aside)
    finally:
        _ours.discard(aside.name)


def recover(parent: str | os.PathLike[str], *, exclusive: bool = False) -> None:
    """Put back what interrupted replacements set aside in `parent`, then remove what dead writers left.

    `publish` does this by itself. `exclusive`: the caller knows that nobody else writes in `parent` (it
    holds the lock of the run), so leftovers of other hosts go as well.
    """
    restore(Path(parent), exclusive=exclusive)
    for path, _ in _abandoned(Path(parent), exclusive=exclusive):
        with contextlib.suppress(OSError):
            _remove(path)
            logger.info("%s: removed, its writer is gone", path)


def restore(parent: Path, *, exclusive: bool = False) -> None:
    """Rename back every version that was set aside by a writer who died before the next one took its name."""
    for path, target in _abandoned(parent, exclusive=exclusive):
        if ".old-" in path.name and not os.path.lexists(target):
            with contextlib.suppress(OSError):
                path.rename(target)
                sync_directory(parent)
                logger.warning("%s: put back, its replacement was interrupted", target)


def _new_name(target: Path) -> Path:
    name = f".{target.name}.tmp-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    _ours.add(name)
    return target.with_name(name)


@contextlib.contextmanager
def _or_discard(path: Path, target: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        discard(path, target)
        raise


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _locked(descriptor: int) -> int:
    with contextlib.suppress(OSError):  # no flock on this filesystem: then the process number has to do
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _abandoned(parent: Path, *, exclusive: bool) -> Iterator[tuple[Path, Path]]:
    """Leftovers in `parent` whose writer is gone, each with the target it was meant for."""
    try:
        names = sorted(path.name for path in parent.iterdir())
    except OSError:
        return
    for name in names:
        match = _NAME.fullmatch(name)
        if match and name not in _ours and (exclusive or _is_dead(match)) and not _is_locked(parent / name):
            yield parent / name, parent / match["target"]


def _is_dead(name: re.Match[str]) -> bool:
    if name["host"] != _host():
        return False
    process = int(name["pid"])
    if process == os.getpid():
        return True  # not one of `_ours`
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False


def _is_locked(path: Path) -> bool:
    """Whether a writer on this machine, in any container, holds `path`, or we may not even look."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # gone by now, a link, or somebody else's
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _remove(path: Path) -> None:
    # The rename that made `path` superfluous must be on disk before `path`, maybe the old version, goes.
    sync_directory(path.parent)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
