"""The files of a prepared directory as they are written, and `shards.json`, which says what they are.

    shards.json         what the numbers mean: vocabulary, tokenizer, source, licence, sizes of the parts
    tokens-00000.bin    uint16 when the vocabulary has at most 65,536 tokens, else uint32; little endian
    offsets-00000.bin   uint64: where documents begin, in tokens, and where the last one ends
    loss-00000.bin      optional, uint8 per token: 1 where a loss is wanted

`shards.json` is written last. Nothing in it names a file, and no size in it is believed before the file has
it: a header that declares 2^62 tokens costs one `stat`.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from durable import ExitCode, UserError

FORMAT_VERSION = 1
HEADER_NAME = "shards.json"
LARGEST_HEADER = 8 * 2**20
"""Bytes: enough for some 100,000 parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSummary:
    """The size of one part, and what is known of its documents."""

    num_tokens: int
    num_documents: int
    has_loss: bool = False
    ends_with_eos: bool = False
    """Every document ends with the end-of-text token, which stands nowhere else."""


_SIZES = {"num_tokens", "num_documents", "has_loss"}
"""What every header has said of a part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardHeader:
    """What `shards.json` says."""

    vocab_size: int
    eos_token_id: int
    tokenizer_fingerprint: str
    source_fingerprint: str
    source: str
    licence: str
    domain: str
    split: str
    parts: tuple[PartSummary, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """How a token is stored."""
        return token_dtype(self.vocab_size)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def part_paths(directory: Path, index: int) -> tuple[Path, Path, Path]:
    """Files of part `index`: tokens, offsets, loss."""
    tokens, offsets, loss = (directory / f"{kind}-{index:05d}.bin" for kind in ("tokens", "offsets", "loss"))
    return tokens, offsets, loss


def write_part(
    directory: Path,
    index: int,
    documents: Iterable[NDArray[Any]],
    dtype: np.dtype[Any],
    loss: Iterable[NDArray[Any]] | None = None,
    *,
    eos_token_id: int | None = None,
) -> PartSummary:
    """Write `documents` one by one, and with `loss` which of their tokens are wanted.

    With `eos_token_id` it is found out whether this token stands at their ends and nowhere else.
    """
    tokens_path, offsets_path, loss_path = part_paths(directory, index)
    offsets, largest, ends_with_eos = [0], np.iinfo(dtype).max, eos_token_id is not None
    masks: Iterable[NDArray[Any] | None] = repeat(None) if loss is None else loss
    with tokens_path.open("wb") as tokens_file, loss_path.open("wb") as loss_file:
        for document, mask in zip(documents, masks, strict=loss is not None):
            if len(document) and not 0 <= int(document.min()) <= int(document.max()) <= largest:
                raise ValueError(f"Cannot store a token id above {largest} or below 0 as {dtype.name}.")
            tokens_file.write(np.ascontiguousarray(document, dtype=dtype).data)
            if mask is not None:
                assert mask.shape == document.shape, "one mark per token"
                loss_file.write(np.ascontiguousarray(mask != 0, dtype=np.uint8).data)
            offsets.append(offsets[-1] + len(document))
            ends_with_eos = ends_with_eos and _ends_with(document, eos_token_id)
    np.array(offsets, dtype="<u8").tofile(offsets_path)
    if loss is None:
        loss_path.unlink()
    return PartSummary(
        num_tokens=offsets[-1],
        num_documents=len(offsets) - 1,
        has_loss=loss is not None,
        ends_with_eos=ends_with_eos,
    )


def _ends_with(document: NDArray[Any], token: int | None) -> bool:
    """Whether the token is the last one, and no other."""
    return len(document) > 0 and bool(document[-1] == token and np.count_nonzero(document == token) == 1)


def finish(directory: Path, header: ShardHeader) -> None:
    """Write `shards.json`: the directory can be opened from now on."""
    content = {"format_version": FORMAT_VERSION, "dtype": header.dtype.name, **asdict(header)}
    (directory / HEADER_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_header(directory: Path) -> ShardHeader:
    """Parse `shards.json`; UserError (exit code 4) says what is wrong with it."""
    path = directory / HEADER_NAME
    try:
        if path.stat().st_size > LARGEST_HEADER:
            raise bad_shard(path, f"is larger than any header ({LARGEST_HEADER:,} bytes)")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        fix = "give a directory that `data prepare` wrote"
        raise UserError(f"{path}: cannot be read", error.strerror, fix, exit_code=ExitCode.BAD_DATA) from None
    except (ValueError, RecursionError) as error:
        raise bad_shard(path, "is truncated or not JSON", error) from None
    return _parse_header(path, content)


def _parse_header(path: Path, content: object) -> ShardHeader:
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        found = content.get("format_version") if isinstance(content, dict) else type(content).__name__
        raise bad_shard(path, f"is not a shard header of format {FORMAT_VERSION}", found)
    listed = content.get("parts")
    if not isinstance(listed, list) or not listed:
        raise bad_shard(path, "lists no parts", type(listed).__name__)
    values: dict[str, Any] = {
        "parts": tuple(_parse_part(path, index, part) for index, part in enumerate(listed))
    }
    for field in fields(ShardHeader):
        if field.name == "parts":
            continue
        value = content.get(field.name)
        if type(value) is not field.type or (type(value) is int and not 0 <= value < 2**32):
            raise bad_shard(path, f"has no valid {field.name}", repr(value))
        values[field.name] = value
    header = ShardHeader(**values)
    if content.get("dtype") != header.dtype.name:
        raise bad_shard(path, f"should have dtype {header.dtype.name}", repr(content.get("dtype")))
    return header


def _parse_part(path: Path, index: int, part: object) -> PartSummary:
    if isinstance(part, dict) and _SIZES <= part.keys() <= {field.name for field in fields(PartSummary)}:
        summary = PartSummary(**part)
        sizes = (summary.num_tokens, summary.num_documents)
        flags = {type(summary.has_loss), type(summary.ends_with_eos)}
        if all(type(size) is int and size >= 0 for size in sizes) and flags == {bool}:
            return summary
    raise bad_shard(path, f"has no sizes for part {index}", repr(part))


def bad_shard(path: Path, what: str, found: object = None) -> UserError:
    """The error for a file of a prepared directory that is not as it should be."""
    fix = "prepare this source again, or copy its directory again"
    return UserError(f"{path}: {what}", found, fix, ExitCode.BAD_DATA)
