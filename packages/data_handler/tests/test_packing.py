"""Packed blocks are checked against a loop over tokens that knows where documents are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_handler.packing import pack_blocks
from data_handler.shards import ShardHeader, Shards, finish, write_part


def prepare(directory: Path, parts: list[list[list[int]]], *, loss: bool = False) -> Shards:
    """A directory with these documents, part by part; odd tokens are wanted when `loss`."""
    directory.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype("<u2")
    written = []
    for index, part in enumerate(parts):
        documents = [np.array(document, np.int64) for document in part]
        marks = [document % 2 for document in documents] if loss else None
        written.append(write_part(directory, index, documents, dtype, marks, eos_token_id=0))
    header = ShardHeader(
        vocab_size=512,
        eos_token_id=0,
        tokenizer_fingerprint="t",
        source_fingerprint="s",
        source=directory.name,
        licence="CC0-1.0",
        domain="text",
        split="train",
        parts=tuple(written),
    )
    finish(directory, header)
    return Shards.open(directory)


@given(
    st.lists(st.lists(st.lists(st.integers(0, 511), max_size=9), max_size=5), min_size=1, max_size=4),
    st.integers(1, 7),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_blocks_restart_positions_and_labels_at_every_document(
    tmp_path_factory: pytest.TempPathFactory,
    parts: list[list[list[int]]],
    block_size: int,
    loss: bool,
    ended: bool,
) -> None:
    if ended:  # as `prepare` writes them: with an end-of-text token, which is then looked for
        parts = [[[*(token or 1 for token in document), 0] for document in part] for part in parts]
    shards = prepare(tmp_path_factory.mktemp("shards"), parts, loss=loss)
    num_blocks = shards.num_tokens // block_size
    rows = np.arange(num_blocks)[::-1].copy()

    batch = pack_blocks(
        {3: shards},
        source_id=np.full(num_blocks, 3),
        starts=rows * block_size,
        sample_id=rows + 100,
        block_size=block_size,
    )

    stream = [(token, place) for part in parts for document in part for place, token in enumerate(document)]
    for row, block in enumerate(rows.tolist()):
        position, document = -1, -1
        for column in range(block_size):
            token, place = stream[block * block_size + column]
            begins = place == 0 or column == 0
            position, document = (0, document + 1) if begins else (position + 1, document)
            label = -100 if begins or (loss and token % 2 == 0) else token
            got = (batch.input_ids, batch.labels, batch.position_ids, batch.document_ids)
            assert [int(tensor[row, column]) for tensor in got] == [token, label, position, document]
    assert batch.sample_id.tolist() == (rows + 100).tolist()
    assert set(batch.source_id.tolist()) <= {3}
    assert all(tensor.dtype == torch.int64 for tensor in (*got, batch.source_id)) if num_blocks else True


def test_samples_of_several_sources_keep_their_rows(tmp_path: Path) -> None:
    low = prepare(tmp_path / "low", [[[1, 2, 3]], [[4, 5, 6, 7]]], loss=True)
    high = prepare(tmp_path / "high", [[[101, 102, 103, 104, 105, 106]]])
    seen: list[int] = []

    batch = pack_blocks(
        {0: low, 2: high},
        source_id=np.array([2, 0, 2, 0]),
        starts=np.array([3, 2, 0, 0]),
        sample_id=np.arange(4),
        block_size=3,
        reading=seen.append,
    )

    assert batch.input_ids.tolist() == [[104, 105, 106], [3, 4, 5], [101, 102, 103], [1, 2, 3]]
    assert batch.labels.tolist() == [[-100, 105, 106], [-100, -100, 5], [-100, 102, 103], [-100, -100, 3]]
    assert seen == [0, 2]


def test_documents_that_end_with_a_token_mix_with_those_that_hold_it_anywhere(tmp_path: Path) -> None:
    ended = prepare(tmp_path / "ended", [[[1, 0], [2, 3, 0]], [[4, 5, 6, 0]]])
    anywhere = prepare(tmp_path / "anywhere", [[[7, 0, 8], [9, 0, 0]]])
    assert [part.ends_with_eos for part in (*ended.header.parts, *anywhere.header.parts)] == [1, 1, 0]

    batch = pack_blocks(
        {0: ended, 1: anywhere},
        source_id=np.array([1, 0, 0]),
        starts=np.array([1, 5, 0]),
        sample_id=np.arange(3),
        block_size=4,
    )

    assert batch.input_ids.tolist() == [[0, 8, 9, 0], [4, 5, 6, 0], [1, 0, 2, 3]]
    assert batch.document_ids.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1], [0, 1, 2, 3], [0, 1, 0, 1]]


@pytest.mark.parametrize("block_size", [256, 257, 65_536, 65_537])
def test_long_blocks_count_as_far_as_they_go(tmp_path: Path, block_size: int) -> None:
    shards = prepare(tmp_path / "s", [[[1] * block_size], [[2]] * block_size])

    batch = pack_blocks(
        {0: shards},
        source_id=np.zeros(2, np.int64),
        starts=np.array([0, block_size]),
        sample_id=np.arange(2),
        block_size=block_size,
    )

    upwards, zeros = torch.arange(block_size), torch.zeros(block_size, dtype=torch.int64)
    assert torch.equal(batch.position_ids, torch.stack([upwards, zeros]))
    assert torch.equal(batch.document_ids, torch.stack([zeros, upwards]))
