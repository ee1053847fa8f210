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

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from data_handler.shards import Shards
from data_handler.types import IGNORED_LABEL, Batch


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
    """The batch whose sample b is `block_size` tokens of source `source_id[b]` from token `starts[b]` on.

    `reading` is told each source before it is read. With `out` [4, B, T] the batch lies in that memory.
    """
    if out is None:
        out = np.empty((4, len(source_id), block_size), np.int64)
    input_ids = out[0]
    wanted, borders = sorted(set(source_id.tolist())), []
    loss = np.ones(input_ids.shape, np.uint8) if any(sources[source].has_loss for source in wanted) else None
    for source in wanted:
        if reading is not None:
            reading(source)
        rows = np.flatnonzero(source_id == source)
        borders += sources[source].read_blocks(starts[rows], rows, input_ids, loss)
    _fill_rest(out, borders, loss)
    return batch_of(torch.from_numpy(out), source_id, sample_id)


def batch_of(per_token: torch.Tensor, source_id: NDArray[np.int64], sample_id: NDArray[np.int64]) -> Batch:
    """A batch from what `pack_blocks` fills: input ids, labels, positions and documents in one tensor."""
    input_ids, labels, position_ids, document_ids = per_token
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        document_ids=document_ids,
        source_id=torch.from_numpy(source_id.copy()),
        sample_id=torch.from_numpy(sample_id.copy()),
    )


def _fill_rest(
    out: NDArray[np.int64], borders: list[NDArray[np.int64]], loss: NDArray[np.uint8] | None
) -> None:
    """Labels, positions and documents of the tokens in `out[0]`, in place: new pages cost more than sums."""
    input_ids, labels, positions, documents = out
    num_rows, length = input_ids.shape
    row_starts = np.arange(num_rows) * length
    begins = np.unique(np.concatenate([row_starts, *borders]))
    np.copyto(labels, input_ids)
    labels.reshape(-1)[begins] = IGNORED_LABEL
    if loss is not None:
        labels[loss == 0] = IGNORED_LABEL
    # Sums of steps: a position goes up by one, or back to 0 where a document begins.
    steps = positions.reshape(-1)
    steps.fill(1)
    steps[begins] = 1 - np.diff(begins, prepend=-1)
    np.cumsum(steps, out=steps)
    first_of_row = np.searchsorted(begins, row_starts)
    steps = documents.reshape(-1)
    steps.fill(0)
    steps[begins] = 1
    steps[row_starts] = 1 - np.diff(first_of_row, prepend=-1)
    np.cumsum(steps, out=steps)
