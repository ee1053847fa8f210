"""One process at a time in a directory: flock on `run.lock`, which says who holds it.

The kernel drops the lock when its holder ends, however it ends, so there is never a stale lock: what a dead
holder wrote into the file is replaced by the next one. The file stays; removing it would let two processes
lock two files.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from durable.disk import writing
from durable.errors import ExitCode, UserError
from durable.syncing import make_directories

LOCK_NAME = "run.lock"

logger = logging.getLogger(__name__)

_held: set[int] = set()


@contextmanager
def lock(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Hold `directory` (created when missing) for the block; yields the path of the lock file.

    UserError with exit code 3 names the process and host that hold it, this process included; 5 when the
    lock cannot be written. A child forked inside the block holds nothing.
    """
    path = Path(directory) / LOCK_NAME
    with writing(path):
        make_directories(path.parent)
    descriptor = _take(path)
    _held.add(descriptor)
    owner = os.getpid()
    try:
        with writing(path):
            _sign(path, descriptor)
        yield path
    finally:
        if os.getpid() == owner:
            _held.discard(descriptor)
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
            os.close(descriptor)


def _take(path: Path) -> int:
    """A descriptor of the file that is at `path` now, locked."""
    while True:
        with writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                return descriptor
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UserError(
                f"{path.parent}: is in use",
                found=f"{holder} holds {LOCK_NAME}",
                fix="wait until it ends, stop it, or choose another directory",
                exit_code=ExitCode.BUSY,
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise _no_locks(path, error) from error
        os.close(descriptor)  # somebody removed the file between our opening and locking it


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))


def _sign(path: Path, descriptor: int) -> None:
    if before := os.pread(descriptor, 1024, 0):
        logger.warning("%s: taken over from %s, which is gone", path, _name(before))
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n"
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _holder(descriptor: int) -> str:
    """Who holds the lock; it may be just about to write that down."""
    for _ in range(20):
        if text := os.pread(descriptor, 1024, 0):
            return _name(text)
        time.sleep(0.01)
    return "a process that has not said its name"


def _name(text: bytes) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on host {holder['host']} (since {holder['since']})"
    except (ValueError, TypeError, KeyError, RecursionError):
        return "an unknown process"


def _no_locks(path: Path, error: OSError) -> UserError:
    where = " on this filesystem" if error.errno in (errno.ENOLCK, errno.ENOTSUP) else ""
    fix = "choose a directory on a local disk"
    return UserError(f"{path}: cannot be locked{where}", error.strerror, fix, ExitCode.CANNOT_WRITE)


def _forget_in_child() -> None:
    """A lock belongs to the open file, which a forked child shares: there it would outlive its holder."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
