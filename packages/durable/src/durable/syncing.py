"""Make bytes and names outlast a power cut: fsync a file for its contents, its directory for its name."""

import errno
import os
from pathlib import Path

_CANNOT_SYNC_DIRECTORIES = {errno.EINVAL, errno.ENOTSUP}


def sync_directory(directory: Path) -> None:
    """Wait until the names in `directory` are on disk; nothing on filesystems that know no such thing."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC_DIRECTORIES:
            raise
    finally:
        os.close(descriptor)


def write_new_file(path: Path, content: bytes) -> None:
    """Create `path` with `content`, on disk when this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directories(directory: Path) -> None:
    """Create `directory` and the parents that are missing, each on disk before the next."""
    missing = [directory, *directory.parents]
    for path in reversed([path for path in missing if not path.exists()]):
        try:
            path.mkdir()
        except FileExistsError:
            continue  # somebody else made it just now
        sync_directory(path.parent)
