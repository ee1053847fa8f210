"""Files, wherever they are: local or any fsspec address, plain or compressed.

A remote file is read block by block, and each block has to arrive within a time limit (`reaching.py`): a
server that stalls in the middle of a body is noticed as one that never answers is.
"""

import gzip
import io
from typing import IO, Any

from data_handler.reaching import reach
from durable import ExitCode, UserError

COMPRESSED = (".gz", ".zst")
BLOCK_BYTES = 2**20
"""Of a remote file: what has to arrive within the time limit."""
_LARGEST_WINDOW = 2**27
"""Of zstandard: a header that asks for more memory is refused."""


def open_file(address: str) -> IO[bytes]:
    """The bytes of a file as they are stored."""
    if "://" not in address:
        return reach(address, lambda: open(address, "rb"))  # noqa: PTH123 -- the caller closes it

    def connect() -> Any:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(address)
        return filesystem.open(path, "rb", block_size=BLOCK_BYTES)

    return io.BufferedReader(_Remote(address, reach(address, connect)), BLOCK_BYTES)


def open_decompressed(address: str) -> IO[bytes]:
    """The bytes of a file after decompression."""
    raw = open_file(address)
    if address.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw, mode="rb")  # type: ignore[return-value]
    if address.endswith(".zst"):
        return io.BufferedReader(_Unzstd(raw), BLOCK_BYTES)
    return raw


def unreadable(address: str, error: BaseException) -> UserError:
    """The error for a file that is there and makes no sense."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UserError(f"{address}: cannot be read", reason, "copy or download it again", ExitCode.BAD_DATA)


class _Remote(io.RawIOBase):
    """A file of fsspec, of which every read has a time limit."""

    def __init__(self, address: str, inner: Any) -> None:
        self._address, self._inner = address, inner

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._inner.seekable())

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._inner.seek(offset, whence))

    def tell(self) -> int:
        return int(self._inner.tell())

    def readinto(self, buffer: Any) -> int:
        # A read that failed has not moved the file, so it can be tried again.
        data = reach(self._address, lambda: self._inner.read(min(len(buffer), BLOCK_BYTES)))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()


class _Unzstd(io.RawIOBase):
    """Decompressed bytes of all frames."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._raw, self._error = raw, zstandard.ZstdError
        decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._stream = decompressor.stream_reader(raw, read_across_frames=True)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except self._error as error:
            raise OSError(str(error)) from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._raw.close()
        super().close()
