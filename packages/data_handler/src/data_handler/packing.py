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
) -> Batch:
    """The batch whose sample b is `block_size` tokens of source `source_id[b]` from token `starts[b]` on.

    `reading` is told each source before it is read.
    """
    input_ids = np.empty((len(source_id), block_size), np.int64)
    wanted, borders = sorted(set(source_id.tolist())), []
    loss = np.ones(input_ids.shape, np.uint8) if any(sources[source].has_loss for source in wanted) else None
    for source in wanted:
        if reading is not None:
            reading(source)
        rows = np.flatnonzero(source_id == source)
        borders += sources[source].read_blocks(starts[rows], rows, input_ids, loss)
    return _typed(input_ids, borders, loss, source_id, sample_id)


def _typed(
    input_ids: NDArray[np.int64],
    borders: list[NDArray[np.int64]],
    loss: NDArray[np.uint8] | None,
    source_id: NDArray[np.int64],
    sample_id: NDArray[np.int64],
) -> Batch:
    num_rows, length = input_ids.shape
    row_starts = np.arange(num_rows) * length
    begins = np.unique(np.concatenate([row_starts, *borders]))
    lengths = np.diff(begins, append=input_ids.size)
    first_of_row = np.searchsorted(begins, row_starts)
    number = np.arange(len(begins)) - first_of_row[begins // length]
    labels = input_ids.copy()
    labels.reshape(-1)[begins] = IGNORED_LABEL
    if loss is not None:
        labels[loss == 0] = IGNORED_LABEL
    positions = np.arange(input_ids.size) - np.repeat(begins, lengths)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(positions.reshape(num_rows, length)),
        document_ids=torch.from_numpy(np.repeat(number, lengths).reshape(num_rows, length)),
        source_id=torch.from_numpy(source_id.astype(np.int64)),
        sample_id=torch.from_numpy(sample_id.astype(np.int64)),
    )
