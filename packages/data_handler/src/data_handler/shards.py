"""Token shards: the documents of a prepared directory (`shard_files.py`), read as one stream.

Parts follow one another as a single stream of documents; each document is as its writer gave it, its
end-of-text token included. Of the offsets one in 32 is kept in memory; a search among these leads to the few
that are read.

A token id that the vocabulary does not have is found when it is read, as looking at every token costs next to
nothing. Other damage keeps sizes and range: `data verify` compares each file with its sha256.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_handler.mapped import MappedFiles
from data_handler.shard_files import (
    HEADER_NAME,
    PartSummary,
    ShardHeader,
    bad_shard,
    finish,
    part_paths,
    read_header,
    token_dtype,
    write_part,
)

__all__ = [
    "HEADER_NAME",
    "PartSummary",
    "ShardHeader",
    "Shards",
    "finish",
    "part_paths",
    "read_header",
    "token_dtype",
    "write_part",
]

_STEP = 32
"""One offset in this many is kept in memory."""
_SLICE = 2**20
"""Offsets that are checked at once."""
_DOCUMENTS_AT_ONCE, _TOKENS_AT_ONCE = 2**14, 2**20
"""Read together by `documents`; one document at least."""


class Shards:
    """The documents of one prepared directory as one stream of tokens, copied out of mapped files.

    A file that vanished, shrank or was replaced since is a `UserError` (exit code 4).
    """

    def __init__(self, directory: Path, header: ShardHeader) -> None:
        self.directory = directory
        self.header = header
        self._tokens, self._offsets = MappedFiles(header.dtype), MappedFiles(np.dtype("<i8"))
        self._loss = MappedFiles(np.dtype(np.uint8))
        marks = []
        for index, part in enumerate(header.parts):
            tokens_path, offsets_path, loss_path = part_paths(directory, index)
            self._tokens.add(tokens_path, part.num_tokens)
            self._offsets.add(offsets_path, part.num_documents + 1)
            if part.has_loss:
                self._loss.add(loss_path, part.num_tokens)
            marks.append(_checked_marks(self._offsets, index, part))
        self._first_token = _running_total(part.num_tokens for part in header.parts)
        self._num_documents = np.array([part.num_documents for part in header.parts])
        self._first_document = _running_total(self._num_documents)
        self._has_loss = np.array([part.has_loss for part in header.parts])
        self._ends_with_eos = all(part.ends_with_eos for part in header.parts)
        self._first_mark = _running_total(map(len, marks))
        self._marks = np.concatenate(
            [mark + first for mark, first in zip(marks, self._first_token[:-1], strict=True)]
        )

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "Shards":
        """Map `directory`; UserError (exit code 4) names the file that is missing, damaged or foreign."""
        return cls(Path(directory), read_header(Path(directory)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards.open, (self.directory,)

    @property
    def num_tokens(self) -> int:
        """Tokens of all parts."""
        return int(self._first_token[-1])

    @property
    def num_documents(self) -> int:
        """Documents of all parts."""
        return int(self._first_document[-1])

    @property
    def has_loss(self) -> bool:
        """Whether any part marks the tokens on which a loss is wanted."""
        return bool(self._has_loss.any())

    def document(self, index: int) -> NDArray[Any]:
        """The tokens of one document, its end-of-text included."""
        start, stop = self.span(index)
        return self.tokens(start, stop)

    def documents(self) -> Iterator[tuple[NDArray[Any], NDArray[np.uint8] | None]]:
        """The tokens of every document in turn, and the marks of them: for one pass, read many at once."""
        for part, num_documents in enumerate(self._num_documents.tolist()):
            first, base = 0, int(self._first_token[part])
            while first < num_documents:
                count = min(_DOCUMENTS_AT_ONCE, num_documents - first)
                offsets = self._offsets.read(np.array([part]), np.array([first]), np.array([count + 1]))
                fitting = int(np.searchsorted(offsets, offsets[0] + _TOKENS_AT_ONCE, side="right")) - 1
                borders = offsets[: max(1, min(fitting, count)) + 1]
                start, stop = base + int(borders[0]), base + int(borders[-1])
                tokens, loss = self.tokens(start, stop), self.loss(start, stop) if self.has_loss else None
                for low, high in pairwise((borders - borders[0]).tolist()):
                    yield tokens[low:high], None if loss is None else loss[low:high]
                first += len(borders) - 1

    def span(self, index: int) -> tuple[int, int]:
        """Where document `index` starts and stops in the stream."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents} in {self.directory}")
        part = int(np.searchsorted(self._first_document, index, side="right")) - 1
        local = index - self._first_document[part]
        start, stop = self._offsets.read(np.array([part]), np.array([local]), np.array([2]))
        base = int(self._first_token[part])
        return base + int(start), base + int(stop)

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens `start … stop - 1` of the stream."""
        wanted = self._stretch(start, stop)
        found = self._read_tokens(wanted, np.empty(max(0, stop - start), self.header.dtype))
        self._require_known(wanted, found)
        return found

    def loss(self, start: int, stop: int) -> NDArray[np.uint8]:
        """1 for each of these tokens on which a loss is wanted."""
        return self._read_loss(self._stretch(start, stop), np.ones(max(0, stop - start), np.uint8))

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Where documents begin inside `start … stop - 1`, in the stream, without empty ones."""
        return np.unique(self._read_borders(self._stretch(start, stop)) + start)

    def read_blocks(
        self,
        starts: NDArray[np.int64],
        rows: NDArray[np.int64],
        tokens: NDArray[Any],
        loss: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.int64] | None:
        """Copy the blocks that begin at `starts` into `rows` of `tokens` [B, T], and their marks into `loss`.

        Returns where documents begin in them, counted through `tokens`, empty ones, too; None when they begin
        behind each end-of-text token and nowhere else. This is the inner loop of training: nothing in it
        loops over blocks, documents or parts. Whether the vocabulary knows the tokens is the caller's to ask,
        once for all sources.
        """
        length = tokens.shape[1]
        wanted = self._stretches(starts, length, rows * length)
        self._read_tokens(wanted, tokens)
        if loss is not None:
            self._read_loss(wanted, loss)
        return None if self._ends_with_eos else self._read_borders(wanted)

    def require_known(self, starts: NDArray[np.int64], rows: NDArray[np.int64], tokens: NDArray[Any]) -> None:
        """UserError (exit code 4) when blocks that `read_blocks` copied hold what is no token."""
        length = tokens.shape[1]
        self._require_known(self._stretches(starts, length, rows * length), tokens.reshape(-1))

    def _stretch(self, start: int, stop: int) -> "_Stretches":
        return self._stretches(np.array([start]), stop - start, np.array([0]))

    def _stretches(self, starts: NDArray[np.int64], length: int, places: NDArray[np.int64]) -> "_Stretches":
        """What blocks consist of: one stretch each, or several where one goes on in the next part."""
        if not len(starts) or length == 0:
            return _Stretches(*np.empty((4, 0), np.int64))
        stops, first = starts + length, self._first_token
        if not 0 <= int(starts.min()) <= int(stops.max()) <= self.num_tokens or length < 0:
            raise IndexError(f"{length} tokens from {starts} of {self.num_tokens} in {self.directory}")
        part = np.searchsorted(first, starts, side="right") - 1
        if (stops <= first[part + 1]).all():  # as nearly always
            return _Stretches(part, starts - first[part], np.full(len(starts), length), places)
        counts = np.searchsorted(first, stops) - part
        block = np.repeat(np.arange(len(starts)), counts)
        part = np.arange(len(block)) + np.repeat(part - np.cumsum(counts) + counts, counts)
        low, high = np.maximum(starts[block], first[part]), np.minimum(stops[block], first[part + 1])
        return _Stretches(part, low - first[part], high - low, (places - starts)[block] + low)

    def _read_tokens(self, wanted: "_Stretches", out: NDArray[Any]) -> NDArray[Any]:
        return self._tokens.read(wanted.part, wanted.start, wanted.length, out=out, places=wanted.place)

    def _require_known(self, wanted: "_Stretches", tokens: NDArray[Any]) -> None:
        columns = (wanted.part, wanted.start, wanted.length, wanted.place)
        for part, start, length, place in zip(*(column.tolist() for column in columns), strict=True):
            stretch = tokens[place : place + length]
            if (stretch >= self.header.vocab_size).any():
                first = int(np.argmax(stretch >= self.header.vocab_size))
                raise bad_shard(
                    self._tokens.path(part),
                    f"is damaged, a token is not below the vocabulary's {self.header.vocab_size:,}",
                    f"{stretch[first]:,} at place {start + first:,}",
                )

    def _read_loss(self, wanted: "_Stretches", out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Parts without marks leave `out` as it is."""
        marked = self._has_loss[wanted.part]
        file = np.cumsum(self._has_loss)[wanted.part] - 1
        stretches = (file[marked], wanted.start[marked], wanted.length[marked])
        return self._loss.read(*stretches, out=out, places=wanted.place[marked])

    def _read_borders(self, wanted: "_Stretches") -> NDArray[np.int64]:
        """Where documents begin, counted as the places are."""
        low = wanted.start + self._first_token[wanted.part]
        first_mark = self._first_mark[wanted.part]
        # From the last mark before the stretch to the first one behind it, without leaving the part.
        begin = np.maximum(np.searchsorted(self._marks, low) - 1 - first_mark, 0) * _STEP
        end = (np.searchsorted(self._marks, low + wanted.length) - first_mark) * _STEP
        counts = np.maximum(np.minimum(end, self._num_documents[wanted.part]) - begin, 0)
        offsets = self._offsets.read(wanted.part, begin, counts)
        inside = offsets - np.repeat(wanted.start, counts)
        # As unsigned numbers, those before the start are behind every end.
        is_inside = inside.view(np.uint64) < np.repeat(wanted.length, counts).view(np.uint64)
        borders: NDArray[np.int64] = (inside + np.repeat(wanted.place, counts))[is_inside]
        return borders


@dataclass(frozen=True, slots=True)
class _Stretches:
    """[N] arrays: which part, from which of its tokens, how many, and where they go in all that is read."""

    part: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    place: NDArray[np.int64]


def _checked_marks(offsets: MappedFiles, index: int, part: PartSummary) -> NDArray[np.int64]:
    """One in `_STEP` of a part's documents' starts, when all of them run from 0 on without a step back."""
    marks, first, last = [], None, 0
    for start in range(0, part.num_documents + 1, _SLICE):
        count = min(_SLICE, part.num_documents + 1 - start)
        found = offsets.read(np.array([index]), np.array([start]), np.array([count]))
        if found[0] < last or (np.diff(found) < 0).any():
            raise bad_shard(offsets.path(index), "has a document that ends before it starts")
        first, last = int(found[0]) if first is None else first, int(found[-1])
        marks.append(found[: part.num_documents - start : _STEP].copy())
    if (first, last) != (0, part.num_tokens):
        raise bad_shard(
            offsets.path(index), f"should run from 0 to {part.num_tokens:,}", f"{first:,} to {last:,}"
        )
    return np.concatenate(marks)


def _running_total(sizes: Iterable[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *sizes])
