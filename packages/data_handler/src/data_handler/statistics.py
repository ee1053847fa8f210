"""What is in a directory that `prepare` wrote, in numbers and in bars."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_handler.shards import HEADER_NAME, Shards, part_paths
from durable import ExitCode, UserError

_WIDTH = 40


def source_dirs(directory: Path) -> list[Path]:
    """The prepared sources in `directory`, or `directory` itself when it is one."""
    if (directory / "manifest.json").is_file():
        return [directory]
    found = sorted(
        path.parent.parent
        for path in directory.glob(f"*/train/{HEADER_NAME}")
        if not path.parts[-3].startswith(".")
    )
    if not found:
        raise UserError(
            f"{directory}: holds no prepared source",
            fix="give the directory that `data prepare` wrote",
            exit_code=ExitCode.BAD_DATA,
        )
    return found


def describe(directory: Path) -> str:
    """Tokens, documents, lengths and shares of each source, with a histogram of lengths."""
    paths = {path.name: path for path in source_dirs(directory)}
    opened = {name: Shards.open(path / "train") for name, path in paths.items()}
    total = sum(shards.num_tokens for shards in opened.values())
    lines = []
    for name, shards in opened.items():
        share = shards.num_tokens / max(total, 1)
        lines.append(
            f"{name:20} {'█' * round(share * _WIDTH):{_WIDTH}} {share:6.1%}  "
            f"{shards.num_tokens:,} tokens, {shards.num_documents:,} documents{_held_out(paths[name])}"
        )
    for name, shards in opened.items():
        lines += ["", *_histogram(name, document_lengths(shards))]
    return "\n".join(lines)


def _held_out(directory: Path) -> str:
    if not (directory / "probe").is_dir():
        return ""
    probe = Shards.open(directory / "probe")
    return f"; {probe.num_tokens:,} tokens, {probe.num_documents:,} documents in the probe"


def document_lengths(shards: Shards) -> NDArray[np.int64]:
    """Tokens of every document."""
    parts = range(len(shards.header.parts))
    lengths = [
        np.diff(np.fromfile(part_paths(shards.directory, n)[1], dtype="<u8").astype(np.int64)) for n in parts
    ]
    return np.concatenate(lengths)


def _histogram(name: str, lengths: NDArray[np.int64]) -> list[str]:
    """Lengths in powers of two."""
    if not len(lengths):
        return [f"{name}: no documents"]
    low, middle, high = np.percentile(lengths, [5, 50, 95]).astype(int)
    lines = [
        f"{name}: tokens in a document: 5 % have up to {low:,}, half {middle:,}, "
        f"95 % {high:,}, longest {lengths.max():,}"
    ]
    counts = np.bincount(np.log2(np.maximum(lengths, 1)).astype(int))
    for power in np.flatnonzero(counts).tolist():
        bar = "█" * max(1, round(counts[power] / counts.max() * _WIDTH))
        lines.append(f"  {2**power:>9,} … {2 ** (power + 1) - 1:<9,} {bar} {counts[power]:,}")
    return lines
