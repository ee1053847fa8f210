"""Where documents come from: a source is cut into pieces, and a piece is read record by record.

    jsonl, text      ranges of bytes; a line belongs to the piece in which it begins
    .gz, .zst        one piece for each file
    parquet          row groups
    hf               the shards of a streamed dataset
    demo             ranges of document numbers

Pieces depend on the config and the files alone. No record is held
that is longer than `max_line_bytes`, so memory is bounded whatever a file contains.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from data_handler import demo
from data_handler.config import DataConfig, SourceConfig, SourceFormat, empty_source
from data_handler.reaching import reach, unreachable
from durable import ExitCode, UserError

_SUFFIXES = {
    ".jsonl": SourceFormat.JSONL,
    ".json": SourceFormat.JSONL,
    ".ndjson": SourceFormat.JSONL,
    ".parquet": SourceFormat.PARQUET,
    ".txt": SourceFormat.TEXT,
    ".text": SourceFormat.TEXT,
    ".md": SourceFormat.TEXT,
}
_COMPRESSED = (".gz", ".zst")
_CHUNK = 2**18


@dataclass(frozen=True, slots=True)
class Piece:
    """One stretch of a source; `start` and `stop` are bytes, row groups, shards or document numbers."""

    format: SourceFormat
    address: str
    start: int
    stop: int
    num_bytes: int
    """What reading it costs, for the progress bar; 0 where nobody knows."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a source, or what is wrong with it."""

    number: int
    """From 1 in its piece."""
    value: Any = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """The pieces of a source, and the identity of what they will read."""

    pieces: tuple[Piece, ...]
    fingerprint: str


def plan_source(name: str, source: SourceConfig, config: DataConfig) -> SourcePlan:
    """Cut a source into pieces; UserError when nothing is there or nothing answers."""
    identity: list[Any]
    if source.format is SourceFormat.DEMO:
        pieces, identity = _demo_pieces(source, config.piece_bytes), [demo.SEED]
    elif source.format is SourceFormat.HF:
        pieces, identity = _hub_pieces(source), [source.revision]
    else:
        pieces, identity = _file_pieces(name, source, config.piece_bytes)
    settings = asdict(source)
    for key in ("weight", "licence", "domain"):  # what changes no token
        del settings[key]
    split = config.seed if source.probe_one_in else None
    known = json.dumps([settings, identity, config.piece_bytes, config.max_line_bytes, split], sort_keys=True)
    return SourcePlan(tuple(pieces), hashlib.sha256(known.encode()).hexdigest())


def read_piece(piece: Piece, source: SourceConfig, max_line_bytes: int) -> Iterator[Record]:
    """The records of a piece, in order."""
    try:
        match piece.format:
            case SourceFormat.DEMO:
                for number in range(piece.start, piece.stop):
                    text = next(demo.documents(piece.address, start=number, stop=number + 1))
                    yield Record(number - piece.start + 1, {source.text_fields[0]: text})
            case SourceFormat.HF:
                yield from _read_hub(piece, source)
            case SourceFormat.PARQUET:
                yield from _read_parquet(piece)
            case _:
                yield from _read_lines(piece, source, max_line_bytes)
    except (OSError, EOFError) as error:
        raise _unreadable(piece.address, error) from error


def _demo_pieces(source: SourceConfig, piece_bytes: int) -> list[Piece]:
    if source.path not in demo.SOURCES:
        raise UserError("path: no such generated source", source.path, choices=demo.SOURCES)
    count, step = demo.num_documents(source.path), max(1, piece_bytes // 512)
    return [
        Piece(
            SourceFormat.DEMO,
            source.path,
            start,
            min(start + step, count),
            (min(start + step, count) - start) * 300,
        )
        for start in range(0, count, step)
    ]


def _file_pieces(name: str, source: SourceConfig, piece_bytes: int) -> tuple[list[Piece], list[Any]]:
    pieces: list[Piece] = []
    identity: list[Any] = []
    for address, size in list_files(name, source.path, source.format):
        kind = _format_of(address, source.format)
        identity.append([address.rpartition("/")[2], size, _edges(address, size)])
        if kind is SourceFormat.PARQUET:
            groups = _num_row_groups(address)
            pieces += [Piece(kind, address, n, n + 1, size // max(groups, 1)) for n in range(groups)]
        elif address.endswith(_COMPRESSED):
            pieces.append(Piece(kind, address, 0, -1, size))
        else:
            ends = [*range(piece_bytes, size, piece_bytes), size] if size else []
            starts = [0, *ends]
            pieces += [Piece(kind, address, a, b, b - a) for a, b in zip(starts, ends, strict=False)]
    return pieces, identity


def list_files(name: str, path: str, kind: SourceFormat) -> list[tuple[str, int]]:
    """(address, bytes) of each file that `path` means, sorted: a file, a directory or a glob."""
    import fsspec

    def listing() -> list[tuple[str, int]]:
        filesystem, inner = fsspec.core.url_to_fs(path)
        if any(character in inner for character in "*?["):
            found = filesystem.glob(inner, detail=True)
            entries = list(found.values()) if isinstance(found, dict) else []
        elif filesystem.isdir(inner):
            entries = list(filesystem.find(inner, detail=True).values())
            entries = [entry for entry in entries if kind is not SourceFormat.AUTO or _guess(entry["name"])]
        else:
            entries = [filesystem.info(inner)]
        entries = [entry for entry in entries if entry["type"] == "file"]
        return sorted(
            (str(filesystem.unstrip_protocol(entry["name"])), int(entry["size"] or 0)) for entry in entries
        )

    files = reach(path, listing)
    if not files:
        raise empty_source(name, path)
    return [(address.removeprefix("file://"), size) for address, size in files]


def _guess(address: str) -> SourceFormat | None:
    bare = address
    for suffix in _COMPRESSED:
        bare = bare.removesuffix(suffix)
    return _SUFFIXES.get(Path(bare).suffix.lower())


def _format_of(address: str, kind: SourceFormat) -> SourceFormat:
    if kind is not SourceFormat.AUTO:
        return kind
    if guessed := _guess(address):
        return guessed
    raise UserError(
        f"{address}: the name does not tell the format",
        Path(address).suffix,
        "set `format`",
        choices=("jsonl", "parquet", "text"),
    )


def _open(address: str) -> IO[bytes]:
    import fsspec

    return reach(address, lambda: fsspec.open(address, "rb").open())


def _edges(address: str, size: int) -> str:
    """A digest of both ends of a file: cheap, and another file of the same size shows."""
    with _open(address) as file:
        digest = hashlib.sha256(file.read(2**16))
        if size > 2**16:
            file.seek(max(2**16, size - 2**16))
            digest.update(file.read(2**16))
    return digest.hexdigest()


def _read_lines(piece: Piece, source: SourceConfig, max_line_bytes: int) -> Iterator[Record]:
    with _decompressed(piece.address) as file:
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
            elif line.strip():
                yield _parse_line(line, number, piece.format, source)


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
    with _open(piece.address) as file:
        while left > 0 and (chunk := file.read(min(_CHUNK * 4, left))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count


def _skip_line(file: IO[bytes]) -> None:
    while (rest := file.readline(_CHUNK)) and not rest.endswith(b"\n"):
        pass


def _decompressed(address: str) -> IO[bytes]:
    raw = _open(address)
    if address.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw, mode="rb")  # type: ignore[return-value]
    if address.endswith(".zst"):
        return _unzstd(raw)
    return raw


def _unzstd(raw: IO[bytes]) -> IO[bytes]:
    import io

    import zstandard

    class _Reader(io.RawIOBase):
        """Decompressed bytes; a window above 128 MB is refused, whatever the header asks for."""

        def __init__(self) -> None:
            decompressor = zstandard.ZstdDecompressor(max_window_size=2**27)
            self._stream = decompressor.stream_reader(raw, read_across_frames=True)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            try:
                data = self._stream.read(len(buffer))
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from None
            buffer[: len(data)] = data
            return len(data)

    return io.BufferedReader(_Reader(), _CHUNK)


def _num_row_groups(address: str) -> int:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    with _open(address) as file:
        try:
            return int(pq.ParquetFile(file).num_row_groups)
        except (ArrowException, OSError) as error:
            raise _unreadable(address, error) from None


def _read_parquet(piece: Piece) -> Iterator[Record]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    with _open(piece.address) as file:
        try:
            row = 0
            for batch in pq.ParquetFile(file).iter_batches(batch_size=256, row_groups=[piece.start]):
                for value in batch.to_pylist():
                    row += 1
                    yield Record(row, value)
        except (ArrowException, OSError, UnicodeDecodeError) as error:
            raise _unreadable(piece.address, error) from None


def _stream(source: SourceConfig) -> Any:
    import datasets

    datasets.config.STREAMING_READ_MAX_RETRIES = 3

    def load() -> Any:
        return datasets.load_dataset(
            source.path, source.subset, split=source.split, revision=source.revision, streaming=True
        )

    return reach(source.path, load)


def _hub_pieces(source: SourceConfig) -> list[Piece]:
    shards = int(_stream(source).num_shards)
    return [Piece(SourceFormat.HF, source.path, shard, shards, 0) for shard in range(shards)]


def _read_hub(piece: Piece, source: SourceConfig) -> Iterator[Record]:
    rows = iter(_stream(source).shard(num_shards=piece.stop, index=piece.start))
    number = 0
    while True:
        try:
            value = next(rows)
        except StopIteration:
            return
        except Exception as error:  # any of several network libraries' own
            raise unreachable(piece.address, f"{type(error).__name__}: {error}") from error
        number += 1
        yield Record(number, value)


def _unreadable(address: str, error: BaseException) -> UserError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UserError(f"{address}: cannot be read", reason, "copy or download it again", ExitCode.BAD_DATA)
