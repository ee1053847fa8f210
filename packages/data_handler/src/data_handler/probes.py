"""Probes: held-out documents of a domain, on which training is measured and never trained.

`hold_out` divides a prepared source once, before training sees it: a document goes to the probe when a seeded
hash of its tokens says so. Whatever else has the same tokens goes there, too, so no copy of a probe document
can be in a training block, wherever it stands and however the blocks are cut. The training directory it
writes holds the rest; `probe.json` beside the probe's shards lists the sha256 of every document.

Shapes: B samples, T tokens.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b, sha256
from itertools import islice, tee
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_handler.packing import pack_blocks
from data_handler.shards import ShardHeader, Shards, finish, write_part
from data_handler.types import Batch
from durable import ExitCode, UserError

PROBE_NAME = "probe.json"
_FORMAT_VERSION = 1


def is_held_out(document: NDArray[Any], *, seed: int, one_in: int) -> bool:
    """Whether a document belongs to the probe: about one in `one_in` does, and equal ones all do or none."""
    digest = blake2b(
        document.astype("<u4").tobytes(), digest_size=8, key=seed.to_bytes(16, "little", signed=True)
    )
    return int.from_bytes(digest.digest(), "little") % one_in == 0


def hold_out(
    source: Shards, *, train_dir: Path, probe_dir: Path, seed: int, one_in: int
) -> tuple[ShardHeader, ShardHeader]:
    """Write the documents of `source` into a training and a probe directory, each into one of them."""
    if one_in < 2:
        raise ValueError(f"One document in {one_in} held out leaves nothing to train on; use 2 or more.")
    chosen = np.array(
        [is_held_out(document, seed=seed, one_in=one_in) for document, _ in source.documents()], dtype=bool
    )
    if chosen.all() or not chosen.any():
        raise UserError(
            f"data.sources.{source.header.source}: cannot hold out one document in {one_in}",
            f"{int(chosen.sum())} of {len(chosen)} documents",
            "prepare more documents, or hold out another share",
            ExitCode.BAD_DATA,
        )
    train = _write_subset(source, ~chosen, train_dir, split="train")
    probe = _write_subset(source, chosen, probe_dir, split="probe")
    held = (
        document for (document, _), is_chosen in zip(source.documents(), chosen, strict=True) if is_chosen
    )
    content = {
        "format_version": _FORMAT_VERSION,
        "domain": source.header.domain,
        "source": source.header.source,
        "seed": seed,
        "one_in": one_in,
        "sha256": [document_hash(document) for document in held],
    }
    (probe_dir / PROBE_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return train, probe


def document_hash(document: NDArray[Any]) -> str:
    """sha256 of the token ids as little-endian uint32, whatever type they are stored in."""
    return sha256(document.astype("<u4").tobytes()).hexdigest()


class Probe:
    """The held-out documents of one domain, checked against their hashes when opened."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.shards = Shards.open(directory)
        self.domain = self.shards.header.domain
        self.hashes = tuple(_read_hashes(Path(directory) / PROBE_NAME))
        found = [document_hash(document) for document, _ in self.shards.documents()]
        if found != list(self.hashes):
            differ = sum(one != other for one, other in zip(found, self.hashes, strict=False))
            raise _bad(
                Path(directory) / PROBE_NAME,
                "does not list the documents beside it",
                f"{len(found)} documents, {len(self.hashes)} hashes, {differ} differ",
            )

    def batches(self, *, block_size: int, batch_size: int, num_samples: int | None = None) -> Iterator[Batch]:
        """The first `num_samples` blocks (or all) in order; the last batch may be smaller."""
        available = self.shards.num_tokens // block_size
        wanted = available if num_samples is None else num_samples
        if not 0 < wanted <= available:
            raise UserError(
                f"data.probes.{self.domain}: has {available} blocks of {block_size} tokens",
                f"{num_samples or 'at least 1'} wanted",
                "hold out more documents, or ask for fewer or shorter blocks",
                ExitCode.BAD_DATA,
            )
        for first in range(0, wanted, batch_size):
            sample_id = np.arange(first, min(first + batch_size, wanted))
            yield pack_blocks(
                {0: self.shards},
                source_id=np.zeros(len(sample_id), np.int64),
                starts=sample_id * block_size,
                sample_id=sample_id,
                block_size=block_size,
            )


def require_disjoint(train: Shards, probe: Probe) -> None:
    """Look at every training document; UserError (exit code 4) when one is in the probe."""
    held = set(probe.hashes)
    for index, (document, _) in enumerate(train.documents()):
        if document_hash(document) in held:
            raise UserError(
                f"{train.directory}: trains on a document of the probe {probe.shards.directory}",
                f"document {index}",
                "prepare the source and its probe together",
                ExitCode.BAD_DATA,
            )


def _write_subset(source: Shards, chosen: NDArray[np.bool_], directory: Path, *, split: str) -> ShardHeader:
    """The chosen documents, cut into as many parts as the source has."""
    directory.mkdir(parents=True, exist_ok=True)
    documents = (both for both, is_chosen in zip(source.documents(), chosen, strict=True) if is_chosen)
    parts = []
    for part, places in enumerate(np.array_split(np.flatnonzero(chosen), len(source.header.parts))):
        mine, again = tee(islice(documents, len(places)))
        tokens = (document for document, _ in mine)
        marks = (mark for _, mark in again if mark is not None) if source.has_loss else None
        eos = source.header.eos_token_id
        parts.append(write_part(directory, part, tokens, source.header.dtype, marks, eos_token_id=eos))
    header = replace(source.header, split=split, parts=tuple(parts))
    finish(directory, header)
    return header


def _read_hashes(path: Path) -> list[str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _bad(path, "cannot be read", error.strerror) from None
    except (ValueError, RecursionError) as error:
        raise _bad(path, "is truncated or not JSON", error) from None
    hashes = content.get("sha256") if isinstance(content, dict) else None
    if not isinstance(hashes, list) or content.get("format_version") != _FORMAT_VERSION:
        raise _bad(path, f"is not a list of documents of format {_FORMAT_VERSION}")
    return [str(value) for value in hashes]


def _bad(path: Path, what: str, found: object = None) -> UserError:
    return UserError(f"{path}: {what}", found, "prepare this source again", ExitCode.BAD_DATA)
