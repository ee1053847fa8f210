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
from data_handler.shards import token_dtype, write_part
from data_handler.sources import Piece, Record, place_of, read_piece
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


class _BadLines:
    """Counts unreadable records, and stops at one more than allowed."""

    def __init__(self, name: str, piece: Piece, allowed: int) -> None:
        self.name, self.piece, self.allowed = name, piece, allowed
        self.found: list[tuple[str, str]] = []

    def add(self, record: Record, problem: str) -> None:
        self.found.append((place_of(self.piece, record.number), problem))
        if len(self.found) > self.allowed:
            raise too_many_bad_lines(self.name, self.found, self.allowed)


def too_many_bad_lines(name: str, found: list[tuple[str, str]], allowed: int) -> UserError:
    """The error for the first bad line that is one too many."""
    place, problem = found[allowed]
    fix = f"mend it, or set sources.{name}.max_bad_lines to {allowed + 1} or more"
    return UserError(f"{place}: a record of {name} {problem}", fix=fix, exit_code=ExitCode.BAD_DATA)


def prepare_piece(
    name: str, source: SourceConfig, piece: Piece, encoder: TextEncoder, target: Path, *, max_line_bytes: int
) -> dict[str, Any]:
    """Write one piece to `target`, and return what its manifest says."""
    encoder = encoder.afresh()
    bad = _BadLines(name, piece, source.max_bad_lines)
    metadata: dict[str, Any] = {}
    with publish(target, metadata=metadata) as directory:
        digests = bytearray()
        documents = _documents(source, piece, encoder, bad, max_line_bytes)
        masks: list[NDArray[np.uint8]] | None = [] if source.answers_only else None
        tokens = _tokens(documents, encoder, digests, masks, source.max_tokens)
        loss = None if masks is None else _drained(masks)
        part = write_part(directory, 0, tokens, token_dtype(encoder.vocab_size), loss)
        (directory / "hashes.bin").write_bytes(digests)
        metadata |= {
            "num_tokens": part.num_tokens,
            "num_documents": part.num_documents,
            "bad_lines": bad.found,
            "num_bytes": piece.num_bytes,
        }
    return metadata


def read_documents(
    name: str, source: SourceConfig, piece: Piece, encoder: TextEncoder, *, max_line_bytes: int
) -> Iterator[Document]:
    """The texts of a piece; UserError (exit code 4) with `file:line` for one bad line more than allowed."""
    return _documents(source, piece, encoder, _BadLines(name, piece, source.max_bad_lines), max_line_bytes)


def _documents(
    source: SourceConfig, piece: Piece, encoder: TextEncoder, bad: _BadLines, max_line_bytes: int
) -> Iterator[Document]:
    for record in read_piece(piece, source, max_line_bytes):
        problem = record.problem
        if problem is None:
            try:
                text, spans = _text(record.value, source, encoder)
                yield Document(
                    text, spans, hashlib.blake2b(text.encode("utf-8"), digest_size=HASH_BYTES).digest()
                )
                continue
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
