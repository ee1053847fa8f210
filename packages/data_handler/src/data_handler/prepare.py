"""Sources become token shards: piece by piece, and again from where it was killed.

    plan pieces ─► prepare-SOURCE/piece-00000 … ─► SOURCE/train, SOURCE/probe (published)

A piece is there whole or not at all, so a kill costs the pieces that were being written. Pieces count in
their order, whichever is ready first: bad lines, the token budget and the first error are those of a single
process, so the result is the same to the bit for any number of processes and any kills. With a budget, only
a few pieces are prepared ahead of the one that decides whether more are needed.
Documents held out for the probe never enter the training shards.
"""

import logging
import os
import shutil
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_handler.assembling import assemble, num_unique_tokens
from data_handler.config import DataConfig, SourceConfig, empty_source
from data_handler.encoder import TextEncoder, load_encoder
from data_handler.piece_pool import PiecePool
from data_handler.piece_worker import Job
from data_handler.pieces import piece_dir, too_many_bad_lines
from data_handler.progress import Meter, Work, no_progress
from data_handler.shards import read_header
from data_handler.sources import SourcePlan, plan_source
from durable import UserError, lock, read_manifest, verify

logger = logging.getLogger(__name__)

PIECES_AHEAD = 2
"""With a token budget, pieces of each process that may be prepared without being needed."""


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


def available_cpus() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare(
    config: DataConfig,
    out_dir: Path,
    *,
    tokenizer: str | Path = "demo",
    fast: bool = True,
    num_workers: int = 0,
    meter: Meter = no_progress,
) -> list[SourceReport]:
    """Prepare every source of positive weight into `out_dir`/SOURCE; what is there and up to date stays.

    With `num_workers` of 2 or more, so many processes prepare pieces; else this one does.
    """
    encoder = load_encoder(tokenizer, fast=fast)
    with lock(out_dir), PiecePool(num_workers, encoder) as pool:
        return [_prepare_source(name, config, out_dir, encoder, pool, meter) for name in config.weights]


def _prepare_source(
    name: str, config: DataConfig, out_dir: Path, encoder: TextEncoder, pool: PiecePool, meter: Meter
) -> SourceReport:
    source, final = config.sources[name], out_dir / name
    plan = plan_source(name, source, config)
    if not plan.pieces:
        raise empty_source(name, source.path)
    all_staging = out_dir / f".prepare-{name}"
    report = _finished(name, final, plan, encoder)
    if report is None:
        staging = all_staging / f"{plan.fingerprint[:16]}-{encoder.fingerprint[:16]}"
        jobs = [
            Job(name, source, piece, piece_dir(staging, index), config.max_line_bytes)
            for index, piece in enumerate(plan.pieces)
        ]
        ready = _prepare_pieces(name, source, jobs, staging, pool, meter)
        metadata = assemble(name, config, plan.fingerprint, ready, staging, final, encoder)
        report = _report(name, final, metadata, was_there=False)
        for place, problem in report.bad_lines:
            logger.warning("%s: skipped %s, which %s", name, place, problem)
    shutil.rmtree(all_staging, ignore_errors=True)
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
    name: str, source: SourceConfig, jobs: list[Job], staging: Path, pool: PiecePool, meter: Meter
) -> list[dict[str, Any]]:
    """Metadata of the first pieces, as many as the token budget needs; each is on disk."""
    staging.mkdir(parents=True, exist_ok=True)
    done = {
        index: dict(read_manifest(job.target).metadata)
        for index, job in enumerate(jobs)
        if (job.target / "manifest.json").is_file()
    }
    work = Work(
        source=name,
        max_tokens=source.max_tokens,
        num_bytes=sum(job.piece.num_bytes for job in jobs),
        tokens_there=sum(int(metadata["num_tokens"]) for metadata in done.values()),
        bytes_there=sum(int(metadata["num_bytes"]) for metadata in done.values()),
    )
    waiting = deque(index for index in range(len(jobs)) if index not in done)
    failed: dict[int, UserError] = {}
    count = _Count(name, source, staging)
    with meter(work) as advance:
        while True:
            while len(count.pieces) in done and not count.is_enough:
                count.add(done[len(count.pieces)])
            place = len(count.pieces)  # of the first piece that is neither done nor superfluous
            if count.is_enough or place == len(jobs):
                break
            if place in failed:
                raise failed[place]
            limit = min(failed, default=len(jobs))
            if source.max_tokens is not None:
                limit = min(limit, place + PIECES_AHEAD * pool.num_workers)
            while pool.has_room and waiting and waiting[0] < limit:
                pool.send(waiting[0], jobs[waiting.popleft()])
            index, answer = pool.receive(advance)
            if isinstance(answer, UserError):
                failed[index] = answer
            else:
                done[index] = answer
    pool.stop()
    return count.pieces


@dataclass(slots=True)
class _Count:
    """The pieces so far, in their order, and what counts in that order."""

    name: str
    source: SourceConfig
    staging: Path
    pieces: list[dict[str, Any]] = field(default_factory=list)
    is_enough: bool = False
    """Whether the token budget is reached for certain."""
    _num_tokens: int = 0
    _bad_lines: list[tuple[str, str]] = field(default_factory=list)

    def add(self, metadata: dict[str, Any]) -> None:
        """The next piece; UserError when it has one bad line more than is allowed."""
        self._bad_lines += [(str(place), str(problem)) for place, problem in metadata["bad_lines"]]
        if len(self._bad_lines) > self.source.max_bad_lines:
            raise too_many_bad_lines(self.name, self._bad_lines, self.source.max_bad_lines)
        self.pieces.append(metadata)
        self._num_tokens += int(metadata["num_tokens"])
        budget = self.source.max_tokens
        if budget is not None and self._num_tokens >= budget:
            unique = self.source.drop_duplicates
            self.is_enough = not unique or num_unique_tokens(self.staging, len(self.pieces)) >= budget


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
