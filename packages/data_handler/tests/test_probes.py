"""What a probe holds is in no training block; the sets are compared document by document."""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_handler.probes import PROBE_NAME, Probe, hold_out, require_disjoint
from data_handler.shards import ShardHeader, Shards, finish, write_part
from durable import UserError

DOCUMENTS = [[1 + n % 7, *range(n % 11), 300 + n % 40, 0] for n in range(90)]


def prepare(directory: Path, documents: list[list[int]], *, loss: bool = False) -> Shards:
    directory.mkdir(parents=True, exist_ok=True)
    parts = []
    for index, first in enumerate(range(0, len(documents), 37)):
        part = [np.array(document) for document in documents[first : first + 37]]
        marks = [document % 2 for document in part] if loss else None
        parts.append(write_part(directory, index, part, np.dtype("<u2"), marks))
    header = ShardHeader(
        vocab_size=512,
        eos_token_id=0,
        tokenizer_fingerprint="t",
        source_fingerprint="s",
        source="web",
        licence="CC0-1.0",
        domain="text",
        split="all",
        parts=tuple(parts),
    )
    finish(directory, header)
    return Shards.open(directory)


def contents(shards: Shards) -> list[tuple[int, ...]]:
    return [tuple(shards.document(index).tolist()) for index in range(shards.num_documents)]


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=30, max_size=80),
    st.integers(-3, 3),
    st.integers(2, 6),
)
@settings(max_examples=30, deadline=None)
def test_every_document_is_on_one_side_with_all_its_copies(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], seed: int, one_in: int
) -> None:
    root = tmp_path_factory.mktemp("held")
    source = prepare(root / "all", documents)
    try:
        hold_out(source, train_dir=root / "train", probe_dir=root / "probe", seed=seed, one_in=one_in)
    except UserError:  # so few distinct documents can all fall on one side
        return

    train, probe = Shards.open(root / "train"), Probe(root / "probe")

    assert sorted(contents(train) + contents(probe.shards)) == sorted(map(tuple, documents))
    assert not set(contents(train)) & set(contents(probe.shards))
    require_disjoint(train, probe)


def test_the_share_is_what_was_asked_for_and_another_seed_holds_out_others(tmp_path: Path) -> None:
    source = prepare(tmp_path / "all", [[n, n // 256, 7, 0] for n in range(512)])
    held = []
    for seed in (0, 1):
        train, probe = (tmp_path / f"{split}{seed}" for split in ("train", "probe"))
        hold_out(source, train_dir=train, probe_dir=probe, seed=seed, one_in=4)
        held.append(set(contents(Shards.open(probe))))

    # 128 expected, six standard deviations of a binomial count: 6 · sqrt(512 · 1/4 · 3/4) = 59.
    assert all(abs(len(documents) - 128) < 59 for documents in held)
    assert held[0] != held[1]


def test_hashes_are_those_of_the_documents_and_marks_go_along(tmp_path: Path) -> None:
    source = prepare(tmp_path / "all", DOCUMENTS, loss=True)

    hold_out(source, train_dir=tmp_path / "train", probe_dir=tmp_path / "probe", seed=0, one_in=5)

    probe = Shards.open(tmp_path / "probe")
    expected = [
        hashlib.sha256(struct.pack(f"<{len(document)}I", *document)).hexdigest()
        for document in contents(probe)
    ]
    saved = json.loads((tmp_path / "probe" / PROBE_NAME).read_text())
    assert saved["sha256"] == expected
    assert (saved["domain"], saved["source"], saved["seed"], saved["one_in"]) == ("text", "web", 0, 5)
    for shards in (probe, Shards.open(tmp_path / "train")):
        tokens = shards.tokens(0, shards.num_tokens)
        assert shards.loss(0, shards.num_tokens).tolist() == (tokens % 2).tolist()
    assert (probe.header.split, Shards.open(tmp_path / "train").header.split) == ("probe", "train")


def test_batches_of_a_probe_are_its_stream_in_order(tmp_path: Path) -> None:
    source = prepare(tmp_path / "all", DOCUMENTS)
    hold_out(source, train_dir=tmp_path / "train", probe_dir=tmp_path / "probe", seed=0, one_in=3)
    probe = Probe(tmp_path / "probe")
    stream = [token for document in contents(probe.shards) for token in document]

    batches = list(probe.batches(block_size=6, batch_size=4, num_samples=10))

    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert [token for batch in batches for token in batch.input_ids.flatten().tolist()] == stream[:60]
    with pytest.raises(UserError, match="blocks of 6 tokens"):
        list(probe.batches(block_size=6, batch_size=4, num_samples=10_000))


def test_a_probe_that_changed_is_refused_and_a_leak_is_found(tmp_path: Path) -> None:
    source = prepare(tmp_path / "all", DOCUMENTS)
    hold_out(source, train_dir=tmp_path / "train", probe_dir=tmp_path / "probe", seed=0, one_in=3)

    with pytest.raises(UserError, match="document"):
        require_disjoint(source, Probe(tmp_path / "probe"))
    tokens = tmp_path / "probe" / "tokens-00000.bin"
    flipped = bytearray(tokens.read_bytes())
    flipped[4] ^= 1
    tokens.write_bytes(flipped)
    with pytest.raises(UserError, match=r"probe.json: does not list") as caught:
        Probe(tmp_path / "probe")

    assert caught.value.exit_code == 4


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1, "sha256": 3}', "[" * 50_000])
def test_a_list_of_hashes_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    source = prepare(tmp_path / "all", DOCUMENTS)
    hold_out(source, train_dir=tmp_path / "train", probe_dir=tmp_path / "probe", seed=0, one_in=3)
    (tmp_path / "probe" / PROBE_NAME).write_text(text)

    with pytest.raises(UserError, match=PROBE_NAME):
        Probe(tmp_path / "probe")
