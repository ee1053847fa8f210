"""Where documents come from: a source is cut into pieces, each of which can be read by itself (`records.py`).

    jsonl, text      ranges of bytes; a line belongs to the piece in which it begins
    .gz, .zst        one piece for each file
    parquet          row groups
    hf               the shards of a streamed dataset
    demo             ranges of document numbers

Pieces depend on the config and the files alone.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_handler import demo
from data_handler.config import DataConfig, SourceConfig, SourceFormat, empty_source
from data_handler.opening import COMPRESSED, open_file, unreadable
from data_handler.reaching import reach
from durable import UserError

_SUFFIXES = {
    ".jsonl": SourceFormat.JSONL,
    ".json": SourceFormat.JSONL,
    ".ndjson": SourceFormat.JSONL,
    ".parquet": SourceFormat.PARQUET,
    ".txt": SourceFormat.TEXT,
    ".text": SourceFormat.TEXT,
    ".md": SourceFormat.TEXT,
}


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
            pieces += [Piece(kind, address, n, n + 1, (size or 0) // max(groups, 1)) for n in range(groups)]
        elif address.endswith(COMPRESSED) or size is None:
            pieces.append(Piece(kind, address, 0, -1, size or 0))
        else:
            ends = [*range(piece_bytes, size, piece_bytes), size] if size else []
            starts = [0, *ends]
            pieces += [Piece(kind, address, a, b, b - a) for a, b in zip(starts, ends, strict=False)]
    return pieces, identity


def list_files(name: str, path: str, kind: SourceFormat) -> list[tuple[str, int | None]]:
    """(address, bytes if known) of each file that `path` means, sorted: a file, a directory or a glob."""
    import fsspec

    def listing() -> list[tuple[str, int | None]]:
        filesystem, inner = fsspec.core.url_to_fs(path)
        # Over http every address may be a page of links: asking would fetch all of it. A ? begins a query.
        is_web = "http" in filesystem.protocol
        if any(character in inner for character in ("*[" if is_web else "*?[")):
            found = filesystem.glob(inner, detail=True)
            entries = list(found.values()) if isinstance(found, dict) else []
        elif (not is_web or inner.endswith("/")) and filesystem.isdir(inner):
            entries = list(filesystem.find(inner, detail=True).values())
            entries = [entry for entry in entries if kind is not SourceFormat.AUTO or _guess(entry["name"])]
        else:
            entries = [filesystem.info(inner)]
        entries = [entry for entry in entries if entry["type"] == "file"]
        return sorted(
            (str(filesystem.unstrip_protocol(entry["name"])), entry.get("size")) for entry in entries
        )

    files = reach(path, listing)
    if not files:
        raise empty_source(name, path)
    return [(address.removeprefix("file://"), size) for address, size in files]


def _guess(address: str) -> SourceFormat | None:
    bare = address
    for suffix in COMPRESSED:
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


def _edges(address: str, size: int | None) -> str:
    """A digest of both ends of a file: cheap, and another file of the same size shows."""
    with open_file(address) as file:
        digest = hashlib.sha256(file.read(2**16))
        if size is not None and size > 2**16:
            file.seek(max(2**16, size - 2**16))
            digest.update(file.read(2**16))
    return digest.hexdigest()


def _num_row_groups(address: str) -> int:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    with open_file(address) as file:
        try:
            return int(pq.ParquetFile(file).num_row_groups)
        except (ArrowException, OSError) as error:
            raise unreadable(address, error) from None


def open_stream(source: SourceConfig) -> Any:
    """A dataset of the hub, streamed."""
    import datasets

    datasets.config.STREAMING_READ_MAX_RETRIES = 3

    def load() -> Any:
        return datasets.load_dataset(
            source.path, source.subset, split=source.split, revision=source.revision, streaming=True
        )

    return reach(source.path, load)


def _hub_pieces(source: SourceConfig) -> list[Piece]:
    shards = int(open_stream(source).num_shards)
    return [Piece(SourceFormat.HF, source.path, shard, shards, 0) for shard in range(shards)]
