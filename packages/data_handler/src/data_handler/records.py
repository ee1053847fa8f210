"""The records of a piece, one by one: lines, rows of parquet, rows of a streamed dataset.

No more is in memory than a record of `max_line_bytes`, or rows of about as much as a block: a longer line is
skipped without being held, a longer value of a parquet file has to be decoded, but gets no further.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

from data_handler import demo
from data_handler.config import SourceConfig, SourceFormat
from data_handler.opening import BLOCK_BYTES, open_decompressed, open_file, unreadable
from data_handler.reaching import reach
from data_handler.sources import Piece, open_stream

_CHUNK = 2**18
_ROWS_BYTES = 4 * 2**20
_MOST_ROWS = 1024
_SECONDS_AT_ONCE = 0.2


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a source, or what is wrong with it."""

    number: int
    """From 1 in its piece."""
    value: Any = None
    problem: str | None = None


def read_piece(piece: Piece, source: SourceConfig, max_line_bytes: int) -> Iterator[Record]:
    """The records of a piece, in order."""
    try:
        match piece.format:
            case SourceFormat.DEMO:
                texts = demo.documents(piece.address, start=piece.start, stop=piece.stop)
                for number, text in enumerate(texts, start=1):
                    yield Record(number, {source.text_fields[0]: text})
            case SourceFormat.HF:
                yield from _read_hub(piece, source)
            case SourceFormat.PARQUET:
                yield from _read_parquet(piece, source, max_line_bytes)
            case _:
                yield from _read_lines(piece, source, max_line_bytes)
    except (OSError, EOFError) as error:
        raise unreadable(piece.address, error) from error


def too_long(max_line_bytes: int) -> str:
    """What is wrong with a record beyond the limit."""
    return f"is longer than {max_line_bytes:,} bytes (max_line_bytes)"


def place_of(piece: Piece, number: int) -> str:
    """`file:line` of record `number`, or what comes closest; lines count from the beginning of the file."""
    match piece.format:
        case SourceFormat.PARQUET:
            return f"{piece.address}:row group {piece.start}:{number}"
        case SourceFormat.HF:
            return f"{piece.address}:shard {piece.start}:{number}"
        case _:
            return f"{piece.address}:{number}"


def lines_before(piece: Piece) -> int:
    """Lines of the file that begin before the piece; documents for a generated source, else 0."""
    if piece.format is SourceFormat.DEMO:
        return piece.start
    if piece.format in (SourceFormat.PARQUET, SourceFormat.HF) or piece.start == 0:
        return 0
    count, left = 1, piece.start - 1  # a line begins after each newline before the last byte
    with open_file(piece.address) as file:
        while left > 0 and (chunk := file.read(min(BLOCK_BYTES, left))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count


def _read_lines(piece: Piece, source: SourceConfig, max_line_bytes: int) -> Iterator[Record]:
    with open_decompressed(piece.address) as file:
        number = 0
        if piece.start:
            file.seek(piece.start - 1)
            if file.read(1) != b"\n":
                _skip_line(file)
        while piece.stop < 0 or file.tell() < piece.stop:
            line = file.readline(max_line_bytes + 1)
            if not line:
                return
            number += 1
            if len(line) > max_line_bytes and not line.endswith(b"\n"):
                _skip_line(file)
                yield Record(number, problem=too_long(max_line_bytes))
            elif not line.isspace():
                record = _parse_line(line, number, piece.format, source)
                del line  # while its text is worked on
                yield record


def _parse_line(line: bytes, number: int, kind: SourceFormat, source: SourceConfig) -> Record:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Record(number, problem=f"is not UTF-8: byte {error.start} is 0x{line[error.start]:02x}")
    if kind is SourceFormat.TEXT:
        return Record(number, {source.text_fields[0]: text.rstrip("\r\n")})
    try:
        return Record(number, json.loads(text))
    except RecursionError:
        return Record(number, problem="is nested too deep")
    except ValueError as error:
        return Record(number, problem=f"is not JSON: {error}")


def _skip_line(file: IO[bytes]) -> None:
    while (rest := file.readline(_CHUNK)) and not rest.endswith(b"\n"):
        pass


def _read_parquet(piece: Piece, source: SourceConfig, max_line_bytes: int) -> Iterator[Record]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    import pyarrow.types as kinds
    from pyarrow import ArrowException

    wanted = [source.messages_field] if source.messages_field is not None else list(source.text_fields)
    with open_file(piece.address) as file:
        try:
            # Pages as they are needed; read ahead, the whole row group would be in memory.
            parquet = pq.ParquetFile(file, buffer_size=BLOCK_BYTES, pre_buffer=False)
            group = parquet.metadata.row_group(piece.start)
            rows = _ROWS_BYTES * group.num_rows // max(1, group.total_byte_size)
            names = [name for name in wanted if name in parquet.schema_arrow.names]
            number = 0
            for batch in parquet.iter_batches(
                batch_size=max(1, min(rows, _MOST_ROWS)), row_groups=[piece.start], columns=names
            ):
                texts = [
                    column
                    for column in batch.columns
                    if kinds.is_string(column.type) or kinds.is_large_string(column.type)
                ]
                longest = [pc.max(pc.binary_length(column)).as_py() or 0 for column in texts]
                for row in range(batch.num_rows) if max(longest, default=0) > max_line_bytes else ():
                    number += 1
                    sizes = [pc.binary_length(column[row]).as_py() or 0 for column in texts]
                    if max(sizes) > max_line_bytes:
                        yield Record(number, problem=too_long(max_line_bytes))
                    else:
                        yield Record(number, batch.slice(row, 1).to_pylist()[0])
                if max(longest, default=0) > max_line_bytes:
                    continue
                for value in batch.to_pylist():
                    number += 1
                    yield Record(number, value)
        except (ArrowException, OSError, UnicodeDecodeError) as error:
            raise unreadable(piece.address, error) from None


def _read_hub(piece: Piece, source: SourceConfig) -> Iterator[Record]:
    rows = iter(open_stream(source).shard(num_shards=piece.stop, index=piece.start))
    number = 0
    # `datasets` tries again by itself; after an error an iterator has ended, and would seem to be complete.
    while values := reach(piece.address, lambda: list(_for_a_moment(rows)), num_tries=1):
        for value in values:
            number += 1
            yield Record(number, value)


def _for_a_moment(rows: Iterator[Any]) -> Iterator[Any]:
    """Some rows, one at least unless that was all: waiting for each by itself would cost more than it."""
    until = time.monotonic() + _SECONDS_AT_ONCE
    size = 0
    for value in islice(rows, _MOST_ROWS):
        yield value
        size += sum(len(item) for item in value.values() if isinstance(item, str))
        if time.monotonic() > until or size > _ROWS_BYTES:
            return
