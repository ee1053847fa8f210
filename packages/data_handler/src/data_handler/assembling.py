"""The pieces of a source become its shards: in their order, without duplicates, up to the budget.

    piece-00000 … ─► train ─► SOURCE/train, SOURCE/probe (published)

Of all documents, 16 bytes each are in memory, by which duplicates are found; of their tokens, one document.
"""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_handler.config import DataConfig, SourceConfig, empty_source
from data_handler.encoder import TextEncoder
from data_handler.pieces import HASH_BYTES, piece_dir
from data_handler.shards import (
    PartSummary,
    ShardHeader,
    Shards,
    finish,
    part_paths,
    token_dtype,
    write_part,
)
from durable import publish


def assemble(
    name: str,
    config: DataConfig,
    fingerprint: str,
    ready: Sequence[dict[str, Any]],
    staging: Path,
    final: Path,
    encoder: TextEncoder,
) -> dict[str, Any]:
    """Put the pieces in `staging` together, publish them, and return what the manifest says of them."""
    source = config.sources[name]
    seen_before = _seen_before(staging, len(ready))
    metadata: dict[str, Any] = {}
    with publish(final, replace=True, metadata=metadata) as directory:
        whole = directory / "train"
        whole.mkdir()
        header = ShardHeader(
            vocab_size=encoder.vocab_size,
            eos_token_id=encoder.eos_token_id,
            tokenizer_fingerprint=encoder.fingerprint,
            source_fingerprint=fingerprint,
            source=name,
            licence=source.licence,
            domain=source.domain,
            split=source.split,
            parts=tuple(_copy_parts(staging, ready, whole, seen_before, source, encoder)),
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
            "bad_lines": [line for piece in ready for line in piece["bad_lines"]],
        }
    return metadata


def _seen_before(staging: Path, num_pieces: int) -> NDArray[np.bool_]:
    """For every document of all pieces: whether an earlier one has the same text."""
    files = [piece_dir(staging, index) / "hashes.bin" for index in range(num_pieces)]
    halves = np.concatenate([np.fromfile(path, dtype="<u8").reshape(-1, HASH_BYTES // 8) for path in files])
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: the earliest of equals comes first
    repeated = np.zeros(len(halves), dtype=np.bool_)
    repeated[order[1:]] = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
    return repeated


def num_unique_tokens(staging: Path, num_pieces: int) -> int:
    """Tokens of the documents that no earlier one repeats."""
    files = [part_paths(piece_dir(staging, index), 0)[1] for index in range(num_pieces)]
    lengths = np.concatenate([np.diff(np.fromfile(path, dtype="<u8").astype(np.int64)) for path in files])
    return int(lengths[~_seen_before(staging, num_pieces)].sum())


def _copy_parts(
    staging: Path,
    ready: Sequence[dict[str, Any]],
    whole: Path,
    seen_before: NDArray[np.bool_],
    source: SourceConfig,
    encoder: TextEncoder,
) -> Iterator[PartSummary]:
    first, num_tokens = 0, 0
    for index, metadata in enumerate(ready):
        if source.max_tokens is not None and num_tokens >= source.max_tokens:
            return
        count = int(metadata["num_documents"])
        dropped = seen_before[first : first + count] & source.drop_duplicates
        first += count
        wanted = ~dropped
        paths = part_paths(piece_dir(staging, index), 0)
        offsets = np.fromfile(paths[1], dtype="<u8").astype(np.int64)
        if source.max_tokens is not None:
            lengths = np.diff(offsets) * wanted
            wanted &= num_tokens + np.cumsum(lengths) - lengths < source.max_tokens
        if wanted.all():
            part = _whole_part(paths, whole, index, metadata, num_tokens=int(offsets[-1]))
        else:
            part = _part_of(paths, whole, index, offsets, np.flatnonzero(wanted).tolist(), encoder)
        num_tokens += part.num_tokens
        yield part


def _whole_part(
    paths: tuple[Path, Path, Path], whole: Path, index: int, metadata: dict[str, Any], *, num_tokens: int
) -> PartSummary:
    """A piece as it is."""
    for path, target in zip(paths, part_paths(whole, index), strict=True):
        if path.is_file():
            _link_or_copy(path, target)
    return PartSummary(
        num_tokens=num_tokens,
        num_documents=int(metadata["num_documents"]),
        has_loss=paths[2].is_file(),
        ends_with_eos=bool(metadata.get("ends_with_eos", False)),
    )


def _part_of(
    paths: tuple[Path, Path, Path],
    whole: Path,
    index: int,
    offsets: NDArray[np.int64],
    kept: list[int],
    encoder: TextEncoder,
) -> PartSummary:
    """A piece without the documents that are not wanted, or beyond the budget."""
    dtype = token_dtype(encoder.vocab_size)
    masks = _slices(paths[2], offsets, kept, np.dtype(np.uint8)) if paths[2].is_file() else None
    documents = _slices(paths[0], offsets, kept, dtype)
    return write_part(whole, index, documents, dtype, masks, eos_token_id=encoder.eos_token_id)


def _link_or_copy(path: Path, target: Path) -> None:
    """The piece goes once its source is published, so the two names need no bytes of their own."""
    try:
        target.hardlink_to(path)
    except OSError:  # not on this filesystem
        shutil.copyfile(path, target)


def _slices(
    path: Path, offsets: NDArray[np.int64], kept: Iterable[int], dtype: np.dtype[Any]
) -> Iterator[NDArray[Any]]:
    """Stretches of a file, one for each document."""
    values = np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
    for number in kept:
        yield np.asarray(values[offsets[number] : offsets[number + 1]])


def _split_off_probe(directory: Path, *, one_in: int, seed: int) -> None:
    """`train` becomes `train` and `probe`."""
    from data_handler.probes import hold_out  # and with it torch, which nothing else here needs

    whole = (directory / "train").rename(directory / "whole")
    train_dir, probe_dir = directory / "train", directory / "probe"
    hold_out(Shards.open(whole), train_dir=train_dir, probe_dir=probe_dir, one_in=one_in, seed=seed)
    shutil.rmtree(whole)
