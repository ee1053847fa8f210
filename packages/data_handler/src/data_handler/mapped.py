"""Binary files mapped into memory and read without touching the maps, so that a lost page kills nobody.

Touching a page of a map whose file has shrunk meanwhile ends the process with SIGBUS, and no `stat` before it
closes the gap. The kernel copies the same pages for whoever asks and returns what it could copy:
`process_vm_readv` on ourselves gathers a thousand stretches of any number of maps in one call. Where it is
missing (macOS) or forbidden (some containers), `preadv` reads stretch by stretch from the files. Each read
ends with a look at its files: what was copied counts when they are still those that were mapped.
"""

import contextlib
import ctypes
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_handler.shard_files import HEADER_NAME, bad_shard

_MOST_STRETCHES = 1024
"""IOV_MAX of Linux: stretches in one call."""

Copier = Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]], int]
"""(addresses to copy from, addresses to copy to, sizes) → bytes copied, in order, until one could not be."""


class MappedFiles:
    """Files of numbers of one type, numbered as they are added."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._files: list[_File] = []
        self._addresses = np.empty(0, np.int64)

    def add(self, path: Path, length: int) -> None:
        """Map a file of `length` numbers; UserError (exit code 4) when it is not that."""
        file = _File(path, length, self.dtype)
        self._files.append(file)
        self._addresses = np.append(self._addresses, file.numbers.ctypes.data if length else 0)

    def path(self, number: int) -> Path:
        """Where a file lies."""
        return self._files[number].path

    def read(
        self,
        files: NDArray[np.int64],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        *,
        out: NDArray[Any] | None = None,
        places: NDArray[np.int64] | None = None,
    ) -> NDArray[Any]:
        """`lengths[i]` numbers of file `files[i]` from `starts[i]` on, for each i.

        They go to `places[i]` of `out`, counted through it; without these one after another to a new array.
        UserError (exit code 4) names a file that vanished, shrank, was replaced or cannot be read.
        """
        ends = np.cumsum(lengths)
        if out is None or places is None:
            out, places = np.empty(int(ends[-1]) if len(ends) else 0, self.dtype), ends - lengths
        assert out.dtype == self.dtype, "bytes are copied as they are"
        assert out.flags.c_contiguous, "places are counted through it"
        itemsize = self.dtype.itemsize
        begins, sizes, targets = starts * itemsize, lengths * itemsize, places * itemsize
        if (copy := memory_copier()) is not None:
            copied = copy(self._addresses[files] + begins, out.ctypes.data + targets, sizes)
        else:
            copied = self._copy_from_files(files, begins, out.reshape(-1).view(np.uint8), targets, sizes)
        for number in set(files.tolist()):
            self._files[number].require_unchanged()
        if len(ends) and copied != ends[-1] * itemsize:
            number = int(files[np.searchsorted(ends * itemsize, copied, side="right")])
            raise bad_shard(self._files[number].path, "cannot be read to its end")
        return out

    def _copy_from_files(
        self,
        files: NDArray[np.int64],
        begins: NDArray[np.int64],
        out: NDArray[np.uint8],
        targets: NDArray[np.int64],
        sizes: NDArray[np.int64],
    ) -> int:
        """Bytes copied, in order, until a stretch could not be."""
        copied, opened, buffer = 0, dict[int, int](), out.data
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for number, begin, target, size in np.column_stack([files, begins, targets, sizes]).tolist():
                if number not in opened:
                    file = stack.enter_context(self._files[number].path.open("rb", buffering=0))
                    opened[number] = file.fileno()
                done = 0
                while done < size:
                    got = os.preadv(opened[number], [buffer[target + done : target + size]], begin + done)
                    if got == 0:
                        return copied
                    done, copied = done + got, copied + got
        return copied


@cache
def memory_copier() -> Copier | None:
    """`process_vm_readv` on this process; None where it cannot be had."""
    try:
        call = ctypes.CDLL(None).process_vm_readv
    except (OSError, AttributeError):
        return None
    call.restype = ctypes.c_ssize_t
    pointer, count = ctypes.c_void_p, ctypes.c_ulong
    call.argtypes = [ctypes.c_int, pointer, count, pointer, count, count]

    def copy(sources: NDArray[np.int64], targets: NDArray[np.int64], sizes: NDArray[np.int64]) -> int:
        theirs, ours = np.column_stack([sources, sizes]), np.column_stack([targets, sizes])
        ends, copied = np.cumsum(sizes), 0
        while (first := int(np.searchsorted(ends, copied, side="right"))) < len(ends):
            # A call may stop early, within a stretch, too: the next goes on from there.
            left = ends[first] - copied
            done = sizes[first] - left
            theirs[first], ours[first] = (sources[first] + done, left), (targets[first] + done, left)
            num = min(_MOST_STRETCHES, len(ends) - first)
            got = call(os.getpid(), ours[first:].ctypes.data, num, theirs[first:].ctypes.data, num, 0)
            if got <= 0:
                break
            copied += got
        return copied

    known, there = np.arange(3), np.zeros(3, np.int64)
    sizes = np.array([known.nbytes])
    copied = copy(np.array([known.ctypes.data]), np.array([there.ctypes.data]), sizes)
    return copy if copied == known.nbytes else None


@dataclass(slots=True, init=False)
class _File:
    """One mapped file, and what it was like when it was mapped."""

    path: Path
    numbers: NDArray[Any]
    size: int
    inode: int

    def __init__(self, path: Path, length: int, dtype: np.dtype[Any]) -> None:
        self.path, self.size = path, length * dtype.itemsize
        try:
            found = path.lstat()
        except OSError as error:
            raise bad_shard(path, "cannot be read", error.strerror) from None
        if not stat.S_ISREG(found.st_mode):
            raise bad_shard(path, "is not a plain file")
        if found.st_size != self.size:
            difference = "is truncated" if found.st_size < self.size else "is too long"
            raise bad_shard(
                path, f"{difference}, {HEADER_NAME} promises {self.size:,} bytes", f"{found.st_size:,}"
            )
        self.inode, self.numbers = found.st_ino, np.empty(0, dtype)
        try:
            if self.size:
                self.numbers = np.memmap(path, dtype=dtype, mode="r", shape=(length,))
        except (OSError, ValueError) as error:
            raise bad_shard(path, "cannot be mapped into memory", str(error)) from None

    def require_unchanged(self) -> None:
        """UserError (exit code 4) unless the file is still there, and as long as it was."""
        try:
            now = self.path.stat()
        except OSError as error:
            raise bad_shard(self.path, "vanished while it was in use", error.strerror) from None
        if now.st_size < self.size or now.st_ino != self.inode:
            what = "shrank" if now.st_size < self.size else "was replaced"
            raise bad_shard(
                self.path, f"{what} while it was in use, it had {self.size:,} bytes", f"{now.st_size:,}"
            )
