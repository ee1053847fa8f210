"""Documents packed to fixed blocks: the stream of a source, cut every T tokens, with its borders kept.

    stream      a a a a a b b b c c c c c │ c c d d d …
    position    0 1 2 3 4 0 1 2 0 1 2 3 4 │ 0 1 0 1 2
    document    0 0 0 0 0 1 1 1 2 2 2 2 2 │ 0 0 1 1 1
    label       - a a a a - b b - c c c c │ - c - d d     (- is -100)

A document that a block cuts begins anew in the next: the model sees nothing of it from before. So the first
token of a block has no label either; there is nothing to predict it from. The tail of a source that does not
fill a block is left out.

Shapes: B samples, T tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_handler.shards import Shards
from data_handler.types import IGNORED_LABEL, Batch


@dataclass(frozen=True, slots=True)
class ReadBlocks:
    """Blocks with what is known of their documents; `write` makes tensors of them, a few rows at a time.

    Reading many blocks at once saves calls, and writing few at once keeps them in the processor's cache.
    """

    tokens: NDArray[Any]
    """[B, T] as stored."""
    loss: NDArray[np.uint8] | None
    """[B, T]: 1 where a loss is wanted; None when it is everywhere."""
    begins: NDArray[np.int64]
    """[D]: where documents begin, and again where a block cuts them, counted through `tokens`; ascending."""
    bounds: list[int]
    """B + 1: how many of `begins` lie before each row, and before the end."""
    lengths: NDArray[np.int64]
    """[D]: their tokens."""
    columns: NDArray[np.unsignedinteger[Any]]
    """[D]: the place in the block of their first; of the smallest type, as it is repeated for each token."""
    numbers: NDArray[np.unsignedinteger[Any]]
    """[D]: from 0 on in each block; of the same type."""

    def write(self, rows: slice, out: NDArray[np.int64]) -> None:
        """Input ids, labels, positions and documents of some blocks, into [4, rows, T]."""
        _, labels, positions, documents = out
        tokens, length = self.tokens[rows], self.tokens.shape[1]
        mine = slice(self.bounds[rows.start], self.bounds[rows.stop])
        np.copyto(out[:2], tokens)
        labels.reshape(-1)[self.begins[mine] - rows.start * length] = IGNORED_LABEL
        if self.loss is not None:
            np.copyto(labels, IGNORED_LABEL, where=self.loss[rows] == 0)
        lengths = self.lengths[mine]
        places = self.columns[mine].repeat(lengths).reshape(tokens.shape)
        np.subtract(np.arange(length, dtype=places.dtype), places, out=places)
        np.copyto(positions, places)
        np.copyto(documents, self.numbers[mine].repeat(lengths).reshape(tokens.shape))


def read_blocks(
    sources: Mapping[int, Shards],
    *,
    source_id: NDArray[np.int64],
    starts: NDArray[np.int64],
    block_size: int,
    reading: Callable[[int], None] | None = None,
    memory: NDArray[Any] | None = None,
) -> ReadBlocks:
    """Block b: `block_size` tokens of source `source_id[b]` from token `starts[b]` on.

    `reading` is told each source before it is read. The tokens lie in `memory` where that has room for them.
    """
    num_blocks = len(source_id)
    wanted = {source: np.flatnonzero(source_id == source) for source in sorted(set(source_id.tolist()))}
    row_starts = np.arange(num_blocks) * block_size
    if memory is None or len(memory) < num_blocks:
        memory = token_memory([sources[source] for source in wanted], num_blocks, block_size)
    tokens = memory[:num_blocks]
    loss = np.ones(tokens.shape, np.uint8) if any(sources[source].has_loss for source in wanted) else None
    is_begin = np.zeros(tokens.shape, np.bool_)
    is_begin[:, 0] = True
    for source, rows in wanted.items():
        if reading is not None:
            reading(source)
        borders = sources[source].read_blocks(starts[rows], rows, tokens, loss)
        if borders is not None:
            is_begin.reshape(-1)[borders] = True
        elif len(wanted) == 1:
            np.equal(tokens[:, :-1], sources[source].header.eos_token_id, out=is_begin[:, 1:])
        else:
            is_begin[rows, 1:] = tokens[rows, :-1] == sources[source].header.eos_token_id
    if wanted and int(tokens.max()) >= min(sources[source].header.vocab_size for source in wanted):
        for source, rows in wanted.items():
            sources[source].require_known(starts[rows], rows, tokens)
    begins = np.flatnonzero(is_begin)
    bounds = np.append(np.searchsorted(begins, row_starts), len(begins))
    row = np.repeat(np.arange(num_blocks), np.diff(bounds))
    columns = begins - row_starts[row]
    smallest = np.min_scalar_type(block_size)
    return ReadBlocks(
        tokens,
        loss,
        begins=begins,
        bounds=bounds.tolist(),
        lengths=np.diff(begins, append=tokens.size),
        columns=columns.astype(smallest),
        numbers=(np.arange(len(begins)) - bounds[row]).astype(smallest),
    )


def token_memory(sources: Sequence[Shards], num_blocks: int, block_size: int) -> NDArray[Any]:
    """Room for blocks of these sources, as their files have them."""
    dtypes = {source.header.dtype for source in sources}
    assert len(dtypes) <= 1, "sources that are mixed were prepared with one tokenizer"
    return np.empty((num_blocks, block_size), dtypes.pop() if dtypes else np.uint16)


def pack_blocks(
    sources: Mapping[int, Shards],
    *,
    source_id: NDArray[np.int64],
    starts: NDArray[np.int64],
    sample_id: NDArray[np.int64],
    block_size: int,
    reading: Callable[[int], None] | None = None,
    out: NDArray[np.int64] | None = None,
) -> Batch:
    """The blocks of `read_blocks` as one batch; with `out` [4, B, T] it lies in that memory."""
    if out is None:
        out = np.empty((4, len(source_id), block_size), np.int64)
    blocks = read_blocks(sources, source_id=source_id, starts=starts, block_size=block_size, reading=reading)
    blocks.write(slice(0, len(source_id)), out)
    own = (torch.from_numpy(each.copy()) for each in (source_id, sample_id))
    return batch_of(torch.from_numpy(out), *own)


def batch_of(per_token: Tensor, source_id: Tensor, sample_id: Tensor) -> Batch:
    """A batch of what `ReadBlocks.write` filled; it lies in the same memory."""
    input_ids, labels, position_ids, document_ids = per_token.unbind()
    return Batch(input_ids, labels, position_ids, document_ids, source_id, sample_id)
