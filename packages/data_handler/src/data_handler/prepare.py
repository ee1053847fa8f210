"""Sources become token shards: piece by piece, and again from where it was killed.

    plan pieces ─► prepare-SOURCE/piece-00000 … ─► SOURCE/train, SOURCE/probe (published)

A piece is there whole or not at all, so a kill costs the pieces that were being written. Pieces are put
together in their order, budgets and bad lines counted in that order, so the result is the same for any kills.
Documents held out for the probe never enter the training shards.
"""

import logging
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_handler.config import DataConfig, SourceConfig, empty_source
from data_handler.encoder import TextEncoder, load_encoder
from data_handler.pieces import HASH_BYTES, prepare_piece, too_many_bad_lines
from data_handler.probes import hold_out
from data_handler.progress import Meter, no_progress
from data_handler.shards import (
    PartSummary,
    ShardHeader,
    Shards,
    finish,
    part_paths,
    read_header,
    token_dtype,
    write_part,
)
from data_handler.sources import Piece, SourcePlan, plan_source
from durable import lock, publish, read_manifest, verify

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceReport:
    """What became of one source."""

    name: str
    directory: Path
    num_tokens: int
    num_documents: int
    num_duplicates: int
    """Documents whose text an earlier one has; dropped when the config says so."""
    bad_lines: tuple[tuple[str, str], ...]
    was_there: bool


def prepare(
    config: DataConfig,
    out_dir: Path,
    *,
    tokenizer: str | Path = "demo",
    fast: bool = True,
    meter: Meter = no_progress,
) -> list[SourceReport]:
    """Prepare every source of positive weight into `out_dir`/SOURCE; what is there and up to date stays."""
    encoder = load_encoder(tokenizer, fast=fast)
    with lock(out_dir):
        return [_prepare_source(name, config, out_dir, encoder, meter) for name in config.weights]


def _prepare_source(
    name: str, config: DataConfig, out_dir: Path, encoder: TextEncoder, meter: Meter
) -> SourceReport:
    source, final = config.sources[name], out_dir / name
    plan = plan_source(name, source, config)
    if not plan.pieces:
        raise empty_source(name, source.path)
    if (report := _finished(name, final, plan, encoder)) is not None:
        return report
    staging = out_dir / f".prepare-{name}" / f"{plan.fingerprint[:16]}-{encoder.fingerprint[:16]}"
    ready = _prepare_pieces(name, source, config, plan, staging, encoder, meter)
    report = _assemble(name, config, plan, ready, staging, final, encoder)
    shutil.rmtree(staging.parent, ignore_errors=True)
    for place, problem in report.bad_lines:
        logger.warning("%s: skipped %s, which %s", name, place, problem)
    return report


def _finished(name: str, final: Path, plan: SourcePlan, encoder: TextEncoder) -> SourceReport | None:
    """The report of a source that is prepared already; None when it is missing or out of date."""
    if not (final / "manifest.json").is_file():
        return None
    manifest = verify(final)
    header = read_header(final / "train")
    if (header.source_fingerprint, header.tokenizer_fingerprint) != (plan.fingerprint, encoder.fingerprint):
        logger.warning(
            "%s: %s was prepared from other data or another tokenizer; preparing it again", name, final
        )
        return None
    return _report(name, final, dict(manifest.metadata), was_there=True)


def _prepare_pieces(
    name: str,
    source: SourceConfig,
    config: DataConfig,
    plan: SourcePlan,
    staging: Path,
    encoder: TextEncoder,
    meter: Meter,
) -> list[dict[str, Any]]:
    """Metadata of the first pieces, as many as the token budget needs; each is on disk."""
    staging.mkdir(parents=True, exist_ok=True)
    done: dict[int, dict[str, Any]] = {}
    for index in range(len(plan.pieces)):
        if (_piece_dir(staging, index) / "manifest.json").is_file():
            done[index] = dict(read_manifest(_piece_dir(staging, index)).metadata)
    total = sum(piece.num_bytes for piece in plan.pieces)
    jobs = [
        (name, source, piece, _piece_dir(staging, index), config.max_line_bytes)
        for index, piece in enumerate(plan.pieces)
    ]
    results = _one_by_one(jobs, done, source, encoder)
    with meter(name, source.max_tokens, total) as advance:
        for metadata in done.values():
            advance(0, int(metadata["num_bytes"]))
        for index, metadata in results:
            done[index] = metadata
            advance(int(metadata["num_tokens"]), int(metadata["num_bytes"]))
    return [done[index] for index in range(_num_needed(done, source, len(jobs)))]


Job = tuple[str, SourceConfig, Piece, Path, int]


def _one_by_one(
    jobs: list[Job], done: dict[int, dict[str, Any]], source: SourceConfig, encoder: TextEncoder
) -> Iterator[tuple[int, dict[str, Any]]]:
    for index, job in enumerate(jobs):
        if index >= _num_needed(done, source, len(jobs)):
            return
        if index not in done:
            yield index, _do(job, encoder)


def _do(job: Job, encoder: TextEncoder) -> dict[str, Any]:
    name, source, piece, target, max_line_bytes = job
    return prepare_piece(name, source, piece, encoder, target, max_line_bytes=max_line_bytes)


def _piece_dir(staging: Path, index: int) -> Path:
    return staging / f"piece-{index:05d}"


def _num_needed(done: dict[int, dict[str, Any]], source: SourceConfig, num_pieces: int) -> int:
    """How many pieces, from the first, can matter: up to the one that reaches the budget for certain."""
    if source.max_tokens is None or source.drop_duplicates:
        return num_pieces
    num_tokens = 0
    for index in range(num_pieces):
        if index not in done:
            return num_pieces
        num_tokens += int(done[index]["num_tokens"])
        if num_tokens >= source.max_tokens:
            return index + 1
    return num_pieces


def _assemble(
    name: str,
    config: DataConfig,
    plan: SourcePlan,
    ready: list[dict[str, Any]],
    staging: Path,
    final: Path,
    encoder: TextEncoder,
) -> SourceReport:
    """Put the pieces together and publish them."""
    source = config.sources[name]
    bad = [(str(place), str(problem)) for metadata in ready for place, problem in metadata["bad_lines"]]
    if len(bad) > source.max_bad_lines:
        raise too_many_bad_lines(name, bad, source.max_bad_lines)
    seen_before = _seen_before(staging, len(ready))
    metadata: dict[str, Any] = {}
    with publish(final, replace=True, metadata=metadata) as directory:
        whole = directory / "train"
        whole.mkdir()
        header = ShardHeader(
            vocab_size=encoder.vocab_size,
            eos_token_id=encoder.eos_token_id,
            tokenizer_fingerprint=encoder.fingerprint,
            source_fingerprint=plan.fingerprint,
            source=name,
            licence=source.licence,
            domain=source.domain,
            split=source.split,
            parts=tuple(
                _copy_parts(staging, ready, whole, seen_before, source, token_dtype(encoder.vocab_size))
            ),
        )
        if sum(part.num_documents for part in header.parts) == 0:
            raise empty_source(name, source.path)
        finish(whole, header)
        if source.probe_one_in is not None:
            _split_off_probe(directory, one_in=source.probe_one_in, seed=config.seed)
        metadata |= {
            "num_tokens": sum(part.num_tokens for part in header.parts),
            "num_documents": sum(part.num_documents for part in header.parts),
            "num_duplicates": int(seen_before.sum()),
            "bad_lines": bad,
        }
    return _report(name, final, metadata, was_there=False)


def _seen_before(staging: Path, num_pieces: int) -> NDArray[np.bool_]:
    """For every document of all pieces: whether an earlier one has the same text."""
    files = [_piece_dir(staging, index) / "hashes.bin" for index in range(num_pieces)]
    halves = np.concatenate([np.fromfile(path, dtype="<u8").reshape(-1, HASH_BYTES // 8) for path in files])
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: the earliest of equals comes first
    repeated = np.zeros(len(halves), dtype=np.bool_)
    repeated[order[1:]] = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
    return repeated


def _copy_parts(
    staging: Path,
    ready: list[dict[str, Any]],
    whole: Path,
    seen_before: NDArray[np.bool_],
    source: SourceConfig,
    dtype: np.dtype[Any],
) -> Iterator[PartSummary]:
    first, num_tokens = 0, 0
    for index, metadata in enumerate(ready):
        if source.max_tokens is not None and num_tokens >= source.max_tokens:
            return
        count = int(metadata["num_documents"])
        dropped = seen_before[first : first + count] & source.drop_duplicates
        first += count
        parts = part_paths(_piece_dir(staging, index), 0)
        part = _copy_part(parts, whole, index, ~dropped, source.max_tokens, num_tokens, dtype)
        num_tokens += part.num_tokens
        yield part


def _copy_part(
    paths: tuple[Path, Path, Path],
    whole: Path,
    index: int,
    wanted: NDArray[np.bool_],
    max_tokens: int | None,
    num_before: int,
    dtype: np.dtype[Any],
) -> PartSummary:
    """One piece as a part, without the documents that are not `wanted` or beyond the budget."""
    offsets = np.fromfile(paths[1], dtype="<u8").astype(np.int64)
    lengths = np.diff(offsets)
    if max_tokens is not None:
        before = num_before + np.cumsum(lengths * wanted) - lengths * wanted
        wanted = wanted & (before < max_tokens)
    has_loss = paths[2].is_file()
    if wanted.all():
        for path, target in zip(paths, part_paths(whole, index), strict=True):
            if path.is_file():
                shutil.copyfile(path, target)
        return PartSummary(num_tokens=int(offsets[-1]), num_documents=len(lengths), has_loss=has_loss)
    kept = np.flatnonzero(wanted).tolist()
    masks = _slices(paths[2], offsets, kept, np.dtype(np.uint8)) if has_loss else None
    return write_part(whole, index, _slices(paths[0], offsets, kept, dtype), dtype, masks)


def _slices(
    path: Path, offsets: NDArray[np.int64], kept: Iterable[int], dtype: np.dtype[Any]
) -> Iterator[NDArray[Any]]:
    """Stretches of a file, one for each document."""
    values = np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
    for number in kept:
        yield np.asarray(values[offsets[number] : offsets[number + 1]])


def _split_off_probe(directory: Path, *, one_in: int, seed: int) -> None:
    """`train` becomes `train` and `probe`."""
    whole = (directory / "train").rename(directory / "whole")
    train_dir, probe_dir = directory / "train", directory / "probe"
    hold_out(Shards.open(whole), train_dir=train_dir, probe_dir=probe_dir, one_in=one_in, seed=seed)
    shutil.rmtree(whole)


def _report(name: str, final: Path, metadata: dict[str, Any], *, was_there: bool) -> SourceReport:
    return SourceReport(
        name=name,
        directory=final,
        num_tokens=int(metadata["num_tokens"]),
        num_documents=int(metadata["num_documents"]),
        num_duplicates=int(metadata["num_duplicates"]),
        bad_lines=tuple((place, problem) for place, problem in metadata["bad_lines"]),
        was_there=was_there,
    )
