"""Token shards: documents as flat binary files that training maps into memory.

    shards.json         what the numbers mean: vocabulary, tokenizer, source, licence, sizes of the parts
    tokens-00000.bin    uint16 when the vocabulary has at most 65,536 tokens, else uint32; little endian
    offsets-00000.bin   uint64: where documents begin, in tokens, and where the last one ends
    loss-00000.bin      optional, uint8 per token: 1 where a loss is wanted

Parts follow one another as a single stream of documents; each document is as its writer gave it, its
end-of-text token included. Nothing in `shards.json` names a file, and no size in it is believed before the
file has it: a header that declares 2^62 tokens costs one `stat`.
"""

import bisect
import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from durable import ExitCode, UserError

FORMAT_VERSION = 1
HEADER_NAME = "shards.json"
LARGEST_HEADER = 8 * 2**20
"""Bytes: enough for some 100,000 parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSummary:
    """The size of one part."""

    num_tokens: int
    num_documents: int
    has_loss: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardHeader:
    """What `shards.json` says."""

    vocab_size: int
    eos_token_id: int
    tokenizer_fingerprint: str
    source_fingerprint: str
    source: str
    licence: str
    domain: str
    split: str
    parts: tuple[PartSummary, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """How a token is stored."""
        return token_dtype(self.vocab_size)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def part_paths(directory: Path, index: int) -> tuple[Path, Path, Path]:
    """Files of part `index`: tokens, offsets, loss."""
    tokens, offsets, loss = (directory / f"{kind}-{index:05d}.bin" for kind in ("tokens", "offsets", "loss"))
    return tokens, offsets, loss


def write_part(
    directory: Path,
    index: int,
    documents: Iterable[NDArray[Any]],
    dtype: np.dtype[Any],
    loss: Iterable[NDArray[Any]] | None = None,
) -> PartSummary:
    """Write `documents` one by one, and with `loss` which of their tokens are wanted."""
    tokens_path, offsets_path, loss_path = part_paths(directory, index)
    offsets, largest = [0], np.iinfo(dtype).max
    masks: Iterable[NDArray[Any] | None] = repeat(None) if loss is None else loss
    with tokens_path.open("wb") as tokens_file, loss_path.open("wb") as loss_file:
        for document, mask in zip(documents, masks, strict=loss is not None):
            if len(document) and not 0 <= int(document.min()) <= int(document.max()) <= largest:
                raise ValueError(f"Cannot store a token id above {largest} or below 0 as {dtype.name}.")
            tokens_file.write(np.ascontiguousarray(document, dtype=dtype).data)
            if mask is not None:
                assert mask.shape == document.shape, "one mark per token"
                loss_file.write(np.ascontiguousarray(mask != 0, dtype=np.uint8).data)
            offsets.append(offsets[-1] + len(document))
    np.array(offsets, dtype="<u8").tofile(offsets_path)
    if loss is None:
        loss_path.unlink()
    return PartSummary(num_tokens=offsets[-1], num_documents=len(offsets) - 1, has_loss=loss is not None)


def finish(directory: Path, header: ShardHeader) -> None:
    """Write `shards.json`: the directory can be opened from now on."""
    content = {"format_version": FORMAT_VERSION, "dtype": header.dtype.name, **asdict(header)}
    (directory / HEADER_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class Shards:
    """The documents of one prepared directory, mapped into memory, as one stream of tokens.

    Every read asks first whether the files are still as they were mapped: one that vanished or shrank is a
    `UserError` (exit code 4), where touching its lost pages would kill the process.
    """

    def __init__(self, directory: Path, header: ShardHeader) -> None:
        self.directory = directory
        self.header = header
        self._parts = [_Part(directory, index, part, header.dtype) for index, part in enumerate(header.parts)]
        self._first_token = _running_total(part.num_tokens for part in header.parts)
        self._first_document = _running_total(part.num_documents for part in header.parts)

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "Shards":
        """Map `directory`; UserError (exit code 4) names the file that is missing, damaged or foreign."""
        return cls(Path(directory), read_header(Path(directory)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards.open, (self.directory,)

    @property
    def num_tokens(self) -> int:
        """Tokens of all parts."""
        return self._first_token[-1]

    @property
    def num_documents(self) -> int:
        """Documents of all parts."""
        return self._first_document[-1]

    @property
    def has_loss(self) -> bool:
        """Whether any part marks the tokens on which a loss is wanted."""
        return any(part.loss is not None for part in self._parts)

    def document(self, index: int) -> NDArray[Any]:
        """The tokens of one document, its end-of-text included."""
        start, stop = self.span(index)
        return self.tokens(start, stop)

    def span(self, index: int) -> tuple[int, int]:
        """Where document `index` starts and stops in the stream."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents} in {self.directory}")
        number = bisect.bisect_right(self._first_document, index) - 1
        part = self._parts[number].checked()
        local, base = index - self._first_document[number], self._first_token[number]
        return base + int(part.offsets[local]), base + int(part.offsets[local + 1])

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens `start … stop - 1` of the stream: a read-only view where they lie in one part."""
        pieces = [part.tokens[low:high] for part, low, high, _ in self._pieces(start, stop)]
        return _joined(pieces, self.header.dtype)

    def loss(self, start: int, stop: int) -> NDArray[np.uint8]:
        """1 for each of these tokens on which a loss is wanted."""
        pieces = [
            np.ones(high - low, np.uint8) if part.loss is None else part.loss[low:high]
            for part, low, high, _ in self._pieces(start, stop)
        ]
        return _joined(pieces, np.dtype(np.uint8))

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Where documents begin inside `start … stop - 1`, in the stream, without empty ones."""
        found = []
        for part, low, high, base in self._pieces(start, stop):
            first, last = np.searchsorted(part.offsets, [low, high])
            found.append(part.offsets[first:last] + base)
        return np.unique(_joined(found, np.dtype(np.int64)))

    def read_blocks(
        self,
        starts: NDArray[np.int64],
        rows: NDArray[np.int64],
        tokens: NDArray[np.int64],
        loss: NDArray[np.uint8] | None = None,
    ) -> list[NDArray[np.int64]]:
        """Copy the blocks that begin at `starts` into `rows` of `tokens` [B, T], and their marks into `loss`.

        Returns where documents begin, counted through all of `tokens`. One pass over the blocks of a part
        looks them up together: this is the inner loop of training.
        """
        length, found = tokens.shape[1], []
        first = np.array(self._first_token)
        number = np.searchsorted(first, starts, side="right") - 1
        whole = starts + length <= first[number + 1]
        for part_number in np.unique(number[whole]).tolist():
            part, base = self._parts[part_number].checked(), self._first_token[part_number]
            mine = whole & (number == part_number)
            local = starts[mine] - base
            bounds = np.searchsorted(part.offsets, [local, local + length]).T.tolist()
            for row, low, (begin, end) in zip(rows[mine].tolist(), local.tolist(), bounds, strict=True):
                tokens[row] = part.tokens[low : low + length]
                found.append(part.offsets[begin:end] + (row * length - low))
                if loss is not None and part.loss is not None:
                    loss[row] = part.loss[low : low + length]
        for row, start in zip(rows[~whole].tolist(), starts[~whole].tolist(), strict=True):
            tokens[row] = self.tokens(start, start + length)
            found.append(self.document_starts(start, start + length) + (row * length - start))
            if loss is not None:
                loss[row] = self.loss(start, start + length)
        return found

    def _pieces(self, start: int, stop: int) -> "Iterator[tuple[_Part, int, int, int]]":
        """(part, first and last token in it, where it begins in the stream) of a stretch of the stream."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.num_tokens} in {self.directory}")
        number = bisect.bisect_right(self._first_token, start) - 1
        while start < stop:
            base, end = self._first_token[number], self._first_token[number + 1]
            if start < end:
                yield self._parts[number].checked(), start - base, min(stop, end) - base, base
                start = min(stop, end)
            number += 1


class _Part:
    """The mapped files of one part."""

    def __init__(self, directory: Path, index: int, summary: PartSummary, dtype: np.dtype[Any]) -> None:
        tokens, offsets, loss = part_paths(directory, index)
        self._files: list[tuple[Path, int, int]] = []
        self.tokens = self._map(tokens, summary.num_tokens, dtype)
        # Signed, or numpy would compare them with signed positions as floats; below 2^63 is checked next.
        self.offsets = self._map(offsets, summary.num_documents + 1, np.dtype("<u8")).view(np.int64)
        self.loss = self._map(loss, summary.num_tokens, np.dtype(np.uint8)) if summary.has_loss else None
        _require_offsets(offsets, self.offsets, summary.num_tokens)

    def checked(self) -> "_Part":
        """This part, after making sure that what was mapped is still there."""
        for path, size, inode in self._files:
            try:
                now = path.stat()
            except OSError as error:
                raise _bad(path, "vanished while it was in use", error.strerror) from None
            if now.st_size < size or now.st_ino != inode:
                what = "shrank" if now.st_size < size else "was replaced"
                raise _bad(path, f"{what} while it was in use, it had {size:,} bytes", f"{now.st_size:,}")
        return self

    def _map(self, path: Path, length: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        try:
            found = path.lstat()
        except OSError as error:
            raise _bad(path, "cannot be read", error.strerror) from None
        if not stat.S_ISREG(found.st_mode):
            raise _bad(path, "is not a plain file")
        size = length * dtype.itemsize
        if found.st_size != size:
            difference = "is truncated" if found.st_size < size else "is too long"
            raise _bad(path, f"{difference}, {HEADER_NAME} promises {size:,} bytes", f"{found.st_size:,}")
        self._files.append((path, size, found.st_ino))
        if size == 0:
            return np.empty(0, dtype)
        try:
            # A plain array over the map: slicing `np.memmap` itself costs microseconds.
            return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(length,)))
        except (OSError, ValueError) as error:
            raise _bad(path, "cannot be mapped into memory", str(error)) from None


def read_header(directory: Path) -> ShardHeader:
    """Parse `shards.json`; UserError (exit code 4) says what is wrong with it."""
    path = directory / HEADER_NAME
    try:
        if path.stat().st_size > LARGEST_HEADER:
            raise _bad(path, f"is larger than any header ({LARGEST_HEADER:,} bytes)")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        fix = "give a directory that `data prepare` wrote"
        raise UserError(f"{path}: cannot be read", error.strerror, fix, exit_code=ExitCode.BAD_DATA) from None
    except (ValueError, RecursionError) as error:
        raise _bad(path, "is truncated or not JSON", error) from None
    return _parse_header(path, content)


def _parse_header(path: Path, content: object) -> ShardHeader:
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        found = content.get("format_version") if isinstance(content, dict) else type(content).__name__
        raise _bad(path, f"is not a shard header of format {FORMAT_VERSION}", found)
    listed = content.get("parts")
    if not isinstance(listed, list) or not listed:
        raise _bad(path, "lists no parts", type(listed).__name__)
    values: dict[str, Any] = {
        "parts": tuple(_parse_part(path, index, part) for index, part in enumerate(listed))
    }
    for field in fields(ShardHeader):
        if field.name == "parts":
            continue
        value = content.get(field.name)
        if type(value) is not field.type or (type(value) is int and not 0 <= value < 2**32):
            raise _bad(path, f"has no valid {field.name}", repr(value))
        values[field.name] = value
    header = ShardHeader(**values)
    if content.get("dtype") != header.dtype.name:
        raise _bad(path, f"should have dtype {header.dtype.name}", repr(content.get("dtype")))
    return header


def _parse_part(path: Path, index: int, part: object) -> PartSummary:
    if isinstance(part, dict) and part.keys() == {field.name for field in fields(PartSummary)}:
        summary = PartSummary(**part)
        sizes = (summary.num_tokens, summary.num_documents)
        if all(type(size) is int and size >= 0 for size in sizes) and type(summary.has_loss) is bool:
            return summary
    raise _bad(path, f"has no sizes for part {index}", repr(part))


def _require_offsets(path: Path, offsets: NDArray[np.int64], num_tokens: int) -> None:
    """From 0 to `num_tokens` without a step back; in slices, so that no copy of all of them is made."""
    if int(offsets[0]) != 0 or int(offsets[-1]) != num_tokens:
        raise _bad(path, f"should run from 0 to {num_tokens:,}", f"{offsets[0]:,} to {offsets[-1]:,}")
    for start in range(0, len(offsets) - 1, 2**20):
        if (np.diff(offsets[start : start + 2**20 + 1]) < 0).any():
            raise _bad(path, "has a document that ends before it starts")


def _joined(pieces: list[NDArray[Any]], dtype: np.dtype[Any]) -> NDArray[Any]:
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces) if pieces else np.empty(0, dtype)


def _running_total(sizes: Iterable[int]) -> list[int]:
    totals = [0]
    for size in sizes:
        totals.append(totals[-1] + size)
    assert all(low <= high for low, high in pairwise(totals))
    return totals


def _bad(path: Path, what: str, found: object = None) -> UserError:
    fix = "prepare this source again, or copy its directory again"
    return UserError(f"{path}: {what}", found, fix, ExitCode.BAD_DATA)
