"""What lies in a directory: plain files, directories, others; symbolic links are seen, never followed."""

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

_READ_ONLY = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO must not make its reader wait


@dataclass(frozen=True, slots=True)
class Tree:
    """A directory's contents, keyed by posix paths relative to it, sorted."""

    files: dict[str, int]
    """Plain files and their sizes."""
    directories: list[str]
    """Without the directory itself; a parent stands before its children."""
    others: dict[str, str]
    """What is neither, and what it is: `a symbolic link`, `a device, pipe or socket`."""


def look_into(directory: Path) -> Tree:
    """List `directory` with everything below it."""
    files: dict[str, int] = {}
    directories: list[str] = []
    others: dict[str, str] = {}
    unvisited = [""]
    while unvisited:
        prefix = unvisited.pop()
        with os.scandir(directory / prefix) as entries:
            for entry in entries:
                path = f"{prefix}/{entry.name}" if prefix else entry.name
                if entry.is_symlink():
                    others[path] = "a symbolic link"
                elif entry.is_dir(follow_symlinks=False):
                    directories.append(path)
                    unvisited.append(path)
                elif entry.is_file(follow_symlinks=False):
                    files[path] = entry.stat(follow_symlinks=False).st_size
                else:
                    others[path] = "a device, pipe or socket"
    return Tree(dict(sorted(files.items())), sorted(directories), dict(sorted(others.items())))


def open_plain_file(path: Path) -> int:
    """A descriptor for reading a plain file; OSError when `path` is a link, a directory or a pipe."""
    descriptor = os.open(path, _READ_ONLY)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(f"{path} is not a plain file")


def sha256_of(descriptor: int) -> str:
    """Hex digest of an open file from its present position, read in pieces."""
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
