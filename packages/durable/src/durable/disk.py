"""Say in one line why something cannot be written: full disk, quota, size limit, permissions, read-only.

Libraries hide these errors. torch turns a full disk into `RuntimeError: unexpected pos`, safetensors into
text that ends in `(os error 28)`; `reason_not_written` looks through both.
"""

import errno
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from durable.errors import ExitCode, UserError
from durable.tree import look_into

_NO_ROOM = {errno.ENOSPC: "the disk has too little room", errno.EDQUOT: "the disk quota is used up"}
_NO_ACCESS = {
    errno.EROFS: ("the filesystem is read-only", "choose a directory on another filesystem"),
    errno.EACCES: ("permission is denied", "change the permissions of its directory, or choose another"),
    errno.EPERM: (
        "the operation is not permitted",
        "change the attributes of its directory, or choose another",
    ),
    errno.ENOTDIR: ("a part of the path is a file", "choose a path whose parents are directories"),
    errno.EBUSY: ("something is mounted there", "choose a directory inside the mount"),
    errno.EXDEV: ("what is there lies on another filesystem or layer", "choose another name"),
    errno.EEXIST: ("something else took its name meanwhile", "choose another name"),
    errno.ENOTEMPTY: ("something else took its name meanwhile", "choose another name"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
}
_WRITE_FAILURES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")
_TORCH_WRITE_FAILURE = re.compile(r"unexpected pos \d+|PytorchStreamWriter failed|file write failed")


def free_bytes(path: Path) -> int | None:
    """What an ordinary user can still write at `path`, or at its nearest parent; None where nobody knows."""
    status = _filesystem(path)
    return status.f_bavail * status.f_frsize if status and status.f_blocks else None


def bytes_below(path: Path) -> int | None:
    """Bytes in the file or directory `path`; None when nobody can tell any more."""
    try:
        return sum(look_into(path).files.values()) if path.is_dir() else path.stat().st_size
    except OSError:
        return None


def require_room(path: Path, bytes_needed: int | None) -> None:
    """Refuse now what would fill the disk later."""
    free = free_bytes(path)
    if bytes_needed is not None and free is not None and free < bytes_needed:
        raise UserError(
            f"{path}: the disk has too little room",
            found=f"{free:,} bytes free, {bytes_needed:,} needed",
            fix=f"free {bytes_needed - free:,} bytes, or choose another disk",
            exit_code=ExitCode.CANNOT_WRITE,
        )


def cannot_write(
    path: Path, reason: int | None, *, written: int | None = None, needed: int | None = None, detail: str = ""
) -> UserError:
    """The error for `path` after a system call failed with the errno `reason`, `written` bytes into it."""
    what, found, fix = detail or os.strerror(reason or errno.EIO), None, "choose another directory"
    if reason in _NO_ROOM:
        status = _filesystem(path)
        no_names = status is not None and status.f_files > 0 and status.f_favail == 0
        what = "the disk can hold no more files" if no_names else _NO_ROOM[reason]
        counts = {"needed": needed, "written": written, "free": free_bytes(path)}
        found = ", ".join(f"{count:,} bytes {name}" for name, count in counts.items() if count is not None)
        fix = "free some space, or choose another disk"
    elif reason == errno.EFBIG:
        limit = _file_size_limit()
        what = "a file grew larger than this process or filesystem allows"
        found = None if limit is None else f"a limit of {limit:,} bytes"
        fix = "raise the limit (ulimit -f), or choose another filesystem"
    elif reason in _NO_ACCESS:
        what, fix = _NO_ACCESS[reason]
    return UserError(f"{path}: cannot be written, {what}", found or None, fix, ExitCode.CANNOT_WRITE)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around our own system calls: whichever fails, the user hears that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error.errno, detail=error.strerror or str(error)) from error


def reason_not_written(error: BaseException, inside: Path, *, before: BaseException | None) -> int | None:
    """The errno, when `error` comes from a write into `inside` that the disk refused; else None.

    `before` is what was being handled when the writing began: it and its causes have nothing to do with it.
    """
    for cause in _causes(error, before):
        if isinstance(cause, OSError) and cause.errno in _WRITE_FAILURES:
            return cause.errno if _is_inside(cause.filename, inside) else None
    if (rust := _RUST_ERRNO.search(str(error))) and int(rust[1]) in _WRITE_FAILURES:
        return int(rust[1])
    if isinstance(error, RuntimeError) and _TORCH_WRITE_FAILURE.search(str(error)):
        limit, written, free = _file_size_limit(), bytes_below(inside), free_bytes(inside)
        if limit is not None and written is not None and written >= limit:
            return errno.EFBIG
        return errno.ENOSPC if free is not None and free < 2**20 else None
    return None


def _causes(error: BaseException, before: BaseException | None) -> Iterator[BaseException]:
    """`error` and what it was raised from, or while handling."""
    current: BaseException | None = error
    for _ in range(100):
        if current is None or current is before:
            return
        yield current
        current = current.__cause__ or current.__context__


def _is_inside(filename: object, directory: Path) -> bool:
    """A failed write names no file: then it was ours. A failed open does."""
    if not isinstance(filename, str | bytes):
        return True
    return Path(os.fsdecode(filename)).absolute().is_relative_to(directory)


def _file_size_limit() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _filesystem(path: Path) -> os.statvfs_result | None:
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return os.statvfs(path)
    except OSError:
        return None
