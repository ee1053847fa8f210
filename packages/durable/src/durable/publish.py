"""Write a directory or a file under another name and give it its own when it is whole and on disk.

    temporary beside it ─► fsync files ─► fsync manifest ─► fsync directories ─► rename ─► fsync parent

Whenever the process or the machine dies, the target is the previous version or the new one, each complete.
A directory that replaces another changes places with it in one step (renameat2). Where the filesystem
cannot do that, the previous version is set aside for the moment between two renames; `recover`, the next
`publish` and `newest_complete` put it back.
"""

import os
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from durable import leftovers, renaming
from durable.disk import bytes_below, cannot_write, reason_not_written, require_room, writing
from durable.errors import ExitCode, UserError
from durable.manifest import (
    LARGEST_MANIFEST,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    normal_metadata,
    path_problem,
    render,
)
from durable.syncing import make_directories, sync_directory, write_new_file
from durable.tree import look_into, open_plain_file, sha256_of


@contextmanager
def publish(
    target: str | os.PathLike[str],
    *,
    replace: bool = False,
    metadata: Mapping[str, object] | None = None,
    bytes_needed: int | None = None,
) -> Iterator[Path]:
    """Yields an empty directory to write into; when the block ends it becomes `target`, with a manifest.

    `target` must not exist, or be empty, unless `replace`: then it must be a published directory, and it
    stays as it is until the new one takes its place. When the block raises, or anything fails, the
    temporary goes and `target` is as it was; a disk that refuses a write, in the block or after it, is a
    `UserError` with exit code 5. `metadata` is for json and is read when the block ends. With
    `bytes_needed`, a disk with less room is refused at the beginning. Only the process that entered the
    block publishes: a child forked inside it leaves without effect.
    """
    final = Path(os.path.realpath(target))
    normal_metadata(metadata)  # what json cannot hold is refused now, not after hours of writing
    with writing(final):
        _prepare(final, bytes_needed)
        _require_replaceable(final, replace)
        temporary, descriptor = leftovers.new_directory(final)
    writer = os.getpid()
    with _until_done(final, temporary, descriptor, bytes_needed):
        yield temporary
        if os.getpid() == writer:
            with writing(final):
                _seal(temporary, final, metadata)
                _require_replaceable(final, replace)
                _move_directory(temporary, final, replace)


@contextmanager
def publish_file(
    target: str | os.PathLike[str], *, replace: bool = False, bytes_needed: int | None = None
) -> Iterator[Path]:
    """Yields an empty file to write; when the block ends it becomes `target`. Like `publish`, for one file.

    A single file has no manifest. One that is replaced hands its permissions on.
    """
    final = Path(os.path.realpath(target))
    with writing(final):
        _prepare(final, bytes_needed)
        _require_free_name(final, replace)
        temporary, descriptor = leftovers.new_file(final)
    writer = os.getpid()
    with _until_done(final, temporary, descriptor, bytes_needed):
        yield temporary
        if os.getpid() == writer:
            with writing(final):
                _sync_file(temporary, permissions=_require_free_name(final, replace))
                _move_file(temporary, final, replace)


@contextmanager
def _until_done(final: Path, temporary: Path, descriptor: int, bytes_needed: int | None) -> Iterator[None]:
    """Whatever happens, `temporary` is gone afterwards, and a disk that refused a write is reported."""
    writer, before = os.getpid(), sys.exception()
    try:
        yield
    except Exception as error:
        known = isinstance(error, UserError) or os.getpid() != writer
        reason = None if known else reason_not_written(error, temporary, before=before)
        if reason is None:
            raise
        raise cannot_write(final, reason, written=bytes_below(temporary), needed=bytes_needed) from error
    finally:
        try:
            if os.getpid() == writer:
                leftovers.discard(temporary, final)
        finally:
            os.close(descriptor)


def _prepare(final: Path, bytes_needed: int | None) -> None:
    make_directories(final.parent)
    leftovers.recover(final.parent)
    require_room(final, bytes_needed)


def _require_replaceable(final: Path, replace: bool) -> None:
    """`final` may become a directory: nothing is there, or an empty one, or a published one to `replace`."""
    if not os.path.lexists(final):
        return
    if not final.is_dir():
        raise _in_the_way(final, "is a file where a directory has to be written", "choose another name")
    if not any(final.iterdir()):
        return
    if not replace:
        raise _in_the_way(final, "exists already", "choose another name, or remove it")
    if not (final / MANIFEST_NAME).is_file():
        raise _in_the_way(
            final,
            f"has no {MANIFEST_NAME}: only what was published is replaced",
            "remove it, or choose another name",
        )


def _require_free_name(final: Path, replace: bool) -> int | None:
    """A file may be written to `final`; the permissions of the one that is there to `replace`."""
    try:
        mode = os.lstat(final).st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise _in_the_way(final, "exists and is not a plain file", "choose another name")
    if not replace:
        raise _in_the_way(final, "exists already", "choose another name, or remove it")
    return stat.S_IMODE(mode)


def _in_the_way(final: Path, what: str, fix: str) -> UserError:
    return UserError(f"{final}: {what}", fix=fix, exit_code=ExitCode.CANNOT_WRITE)


def _seal(temporary: Path, final: Path, metadata: Mapping[str, object] | None) -> None:
    """Everything in `temporary` is on disk, and a manifest says so."""
    tree = look_into(temporary)
    for path in [*tree.files, *tree.others]:
        if problem := (f"is {tree.others[path]}" if path in tree.others else path_problem(path)):
            raise _in_the_way(
                final / path, f"cannot be published, {problem}", "write plain files with plain names"
            )
    files = {path: _hash_and_sync(temporary / path) for path in tree.files}
    text = render(Manifest(files, normal_metadata(metadata)))
    if len(text) > LARGEST_MANIFEST:
        what = f"needs a manifest of {len(text):,} bytes for its {len(files):,} files, which is too large"
        raise _in_the_way(final, what, f"put many files into one: {LARGEST_MANIFEST:,} bytes are allowed")
    write_new_file(temporary / MANIFEST_NAME, text)
    for path in [*reversed(tree.directories), ""]:
        sync_directory(temporary / path)


def _hash_and_sync(path: Path) -> FileEntry:
    descriptor = open_plain_file(path)
    try:
        digest = sha256_of(descriptor)
        os.fsync(descriptor)
        return FileEntry(os.fstat(descriptor).st_size, digest)
    finally:
        os.close(descriptor)


def _sync_file(path: Path, *, permissions: int | None) -> None:
    descriptor = open_plain_file(path)
    try:
        if permissions is not None:
            os.fchmod(descriptor, permissions)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_directory(temporary: Path, final: Path, replace: bool) -> None:
    """`final` is the new version, and on disk; the previous one is under one of the two other names."""
    replaces = replace and final.is_dir() and any(final.iterdir())
    exchanged = replaces and renaming.exchange(temporary, final)
    if not exchanged:
        if replaces:
            final.rename(leftovers.aside_name(temporary))
        temporary.rename(final)
    try:
        sync_directory(final.parent)
    except BaseException:
        with suppress(OSError):  # nobody knows whether the rename is on disk: undo it, and report
            if not (exchanged and renaming.exchange(temporary, final)):
                final.rename(temporary)
        raise


def _move_file(temporary: Path, final: Path, replace: bool) -> None:
    replaced = replace and os.path.lexists(final)
    if replaced:
        temporary.rename(final)
    else:
        renaming.rename_new(temporary, final)
    try:
        sync_directory(final.parent)
    except BaseException:
        if not replaced:
            with suppress(OSError):
                final.rename(temporary)
        raise
