"""One piece of a source becomes token files, published together or not at all.

    piece-00012/  tokens-00000.bin  offsets-00000.bin  [loss-00000.bin]  hashes.bin  manifest.json

`hashes.bin` holds 16 bytes for each document (BLAKE2b of its text), by which duplicates are found across
pieces. The manifest's metadata says what was skipped. What a piece becomes depends on nothing but the piece.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_handler.chat import render_chat
from data_handler.config import SourceConfig
from data_handler.encoder import TextEncoder
from data_handler.progress import Advance
from data_handler.records import Record, lines_before, place_of, read_piece, too_long
from data_handler.shards import token_dtype, write_part
from data_handler.sources import Piece
from durable import ExitCode, UserError, publish

HASH_BYTES = 16
_BATCH_CHARACTERS = 2**20
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True, slots=True)
class Document:
    """A text, and the characters of it on which a loss is wanted (None: all)."""

    text: str
    spans: tuple[tuple[int, int], ...] | None
    digest: bytes


class _TooManyError(Exception):
    """One bad line more than allowed, of which the collector knows."""


class _BadLines:
    """Collects unreadable records, and stops at one more than allowed."""

    def __init__(self, piece: Piece, allowed: int) -> None:
        self.piece, self.allowed = piece, allowed
        self.found: list[tuple[str, str]] = []
        self._lines_before: int | None = None

    def add(self, record: Record, problem: str) -> None:
        if self._lines_before is None:
            self._lines_before = lines_before(self.piece)
        self.found.append((place_of(self.piece, self._lines_before + record.number), problem))
        if len(self.found) > self.allowed:
            raise _TooManyError


def too_many_bad_lines(name: str, found: list[tuple[str, str]], allowed: int) -> UserError:
    """The error for the first bad line that is one too many."""
    place, problem = found[allowed]
    fix = f"mend it, or set sources.{name}.max_bad_lines to {allowed + 1} or more"
    return UserError(f"{place}: a record of {name} {problem}", fix=fix, exit_code=ExitCode.BAD_DATA)


def piece_dir(staging: Path, index: int) -> Path:
    """Where piece `index` of a source lies until all are there."""
    return staging / f"piece-{index:05d}"


def prepare_piece(
    name: str,
    source: SourceConfig,
    piece: Piece,
    encoder: TextEncoder,
    target: Path,
    *,
    max_line_bytes: int,
    advance: Advance = lambda tokens, size: None,
) -> dict[str, Any]:
    """Write one piece to `target`, and return what its manifest says.

    With one bad line more than allowed there is nothing to write: what is returned then holds these lines,
    for how many of them the pieces before leave, the caller knows.
    """
    encoder = encoder.afresh()
    bad = _BadLines(piece, source.max_bad_lines)
    metadata: dict[str, Any] = {}
    shown = _Shown(piece.num_bytes, advance)
    try:
        with publish(target, metadata=metadata) as directory:
            digests = bytearray()
            documents = _documents(source, piece, encoder, bad, max_line_bytes)
            masks: list[NDArray[np.uint8]] | None = [] if source.answers_only else None
            tokens = _tokens(documents, encoder, digests, masks, source.max_tokens, shown)
            loss = None if masks is None else _drained(masks)
            dtype, eos = token_dtype(encoder.vocab_size), encoder.eos_token_id
            part = write_part(directory, 0, tokens, dtype, loss, eos_token_id=eos)
            (directory / "hashes.bin").write_bytes(digests)
            metadata |= {
                "num_tokens": part.num_tokens,
                "num_documents": part.num_documents,
                "ends_with_eos": part.ends_with_eos,
                "bad_lines": bad.found,
                "num_bytes": piece.num_bytes,
            }
    except _TooManyError:
        return {"num_tokens": 0, "num_documents": 0, "bad_lines": bad.found, "num_bytes": 0}
    shown.rest()
    return metadata


class _Shown:
    """Tells how far a piece is: its text is some share of its bytes, and its end is all of them."""

    def __init__(self, num_bytes: int, advance: Advance) -> None:
        self._left, self._advance = num_bytes, advance

    def add(self, tokens: int, size: int) -> None:
        self._advance(tokens, min(size, self._left))
        self._left -= min(size, self._left)

    def rest(self) -> None:
        self._advance(0, self._left)


def read_documents(
    name: str, source: SourceConfig, piece: Piece, encoder: TextEncoder, *, max_line_bytes: int
) -> Iterator[Document]:
    """The texts of a piece; UserError (exit code 4) with `file:line` for one bad line more than allowed."""
    bad = _BadLines(piece, source.max_bad_lines)
    try:
        yield from _documents(source, piece, encoder, bad, max_line_bytes)
    except _TooManyError:
        raise too_many_bad_lines(name, bad.found, bad.allowed) from None


def _documents(
    source: SourceConfig, piece: Piece, encoder: TextEncoder, bad: _BadLines, max_line_bytes: int
) -> Iterator[Document]:
    for record in read_piece(piece, source, max_line_bytes):
        problem = record.problem
        if problem is None:
            try:
                text, spans = _text(record.value, source, encoder)
                encoded = text.encode("utf-8")
                if len(encoded) <= max_line_bytes:
                    yield Document(text, spans, hashlib.blake2b(encoded, digest_size=HASH_BYTES).digest())
                    continue
                problem = too_long(max_line_bytes)
            except UnicodeEncodeError:
                problem = "has half of a surrogate pair"
            except ValueError as error:
                problem = str(error)
        bad.add(record, problem)


def _text(
    value: Any, source: SourceConfig, encoder: TextEncoder
) -> tuple[str, tuple[tuple[int, int], ...] | None]:
    """The text of a record; ValueError says what it lacks."""
    if not isinstance(value, dict):
        raise ValueError(f"is not an object but of type {type(value).__name__}")
    if source.messages_field is not None:
        rendered, spans = render_chat(value.get(source.messages_field), encoder.chat_template)
        return rendered, spans if source.answers_only else None
    texts = []
    for field in source.text_fields:
        text = value.get(field)
        if not isinstance(text, str):
            state = (
                "is missing"
                if field not in value
                else f"is {'null' if text is None else type(text).__name__}"
            )
            raise ValueError(f"has no text: field {field!r} {state}")
        texts.append(text)
    return source.text_separator.join(texts), None


def _tokens(
    documents: Iterator[Document],
    encoder: TextEncoder,
    digests: bytearray,
    masks: list[NDArray[np.uint8]] | None,
    max_tokens: int | None,
    shown: _Shown,
) -> Iterator[NDArray[np.uint32]]:
    """Ids of each document, end-of-text included, until the budget is reached."""
    end, num_tokens = np.array([encoder.eos_token_id], dtype=np.uint32), 0
    for batch in _batches(documents):
        if masks is None:
            encoded = encoder.encode([document.text for document in batch])
        else:
            pairs = [encoder.encode_with_spans(document.text, document.spans or ()) for document in batch]
            encoded = [ids for ids, _ in pairs]
        for index, (document, ids) in enumerate(zip(batch, encoded, strict=True)):
            if masks is not None:
                masks.append(np.concatenate([pairs[index][1], np.zeros(1, np.uint8)]))
            digests += document.digest
            num_tokens += len(ids) + 1
            yield np.concatenate([ids, end])
            if max_tokens is not None and num_tokens >= max_tokens:
                return
        shown.add(sum(map(len, encoded)) + len(batch), sum(len(document.text) for document in batch))


def _drained(masks: list[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    """The mask of the document that was just yielded, each time."""
    while masks:
        yield masks.pop(0)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
