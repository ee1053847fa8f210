"""Shards come back as they were written; whatever else lies there is refused in one line, with its file."""

import copy
import gc
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_handler.shards import HEADER_NAME, ShardHeader, Shards, finish, write_part
from durable import UserError

DOCUMENTS = [[5, 6, 7, 0], [8, 0], [], [9, 10, 11, 12, 0], [300, 0]]


def write(directory: Path, *, per_part: int = 3, vocab_size: int = 512, loss: bool = False) -> Path:
    """A prepared directory with `DOCUMENTS`."""
    directory.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype("<u2" if vocab_size <= 65_536 else "<u4")
    parts = []
    for index, first in enumerate(range(0, len(DOCUMENTS), per_part)):
        documents = [np.array(document, np.int64) for document in DOCUMENTS[first : first + per_part]]
        marks = [document % 2 for document in documents] if loss else None
        parts.append(write_part(directory, index, documents, dtype, marks))
    header = ShardHeader(
        vocab_size=vocab_size,
        eos_token_id=0,
        tokenizer_fingerprint="t",
        source_fingerprint="s",
        source="letters",
        licence="CC0-1.0",
        domain="text",
        split="train",
        parts=tuple(parts),
    )
    finish(directory, header)
    return directory


@pytest.mark.parametrize("per_part", [1, 2, 3, 5])
@pytest.mark.parametrize("vocab_size", [65_536, 65_537])
def test_documents_come_back_from_any_number_of_parts(tmp_path: Path, per_part: int, vocab_size: int) -> None:
    shards = Shards.open(write(tmp_path, per_part=per_part, vocab_size=vocab_size))

    assert [shards.document(index).tolist() for index in range(shards.num_documents)] == DOCUMENTS
    assert (tmp_path / "tokens-00000.bin").stat().st_size % (2 if vocab_size == 65_536 else 4) == 0
    assert shards.tokens(0, 1).dtype.itemsize == (2 if vocab_size == 65_536 else 4)


@pytest.mark.parametrize("per_part", [1, 3, 5])
@pytest.mark.parametrize("loss", [False, True])
@pytest.mark.parametrize(("documents_at_once", "tokens_at_once"), [(1, 100), (2, 3), (100, 6), (100, 100)])
def test_one_pass_gives_every_document_however_many_are_read_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    per_part: int,
    loss: bool,
    documents_at_once: int,
    tokens_at_once: int,
) -> None:
    monkeypatch.setattr("data_handler.shards._DOCUMENTS_AT_ONCE", documents_at_once)
    monkeypatch.setattr("data_handler.shards._TOKENS_AT_ONCE", tokens_at_once)

    found = list(Shards.open(write(tmp_path, per_part=per_part, loss=loss)).documents())

    assert [tokens.tolist() for tokens, _ in found] == DOCUMENTS
    marks = [[token % 2 for token in document] if loss else None for document in DOCUMENTS]
    assert [None if mark is None else mark.tolist() for _, mark in found] == marks


@pytest.mark.parametrize("per_part", [1, 2, 5])
def test_every_stretch_of_the_stream_is_that_of_the_joined_documents(tmp_path: Path, per_part: int) -> None:
    shards = Shards.open(write(tmp_path, per_part=per_part, loss=True))
    stream = [token for document in DOCUMENTS for token in document]
    begins = {sum(map(len, DOCUMENTS[:index])) for index, document in enumerate(DOCUMENTS) if document}

    for start in range(len(stream) + 1):
        for stop in range(start, len(stream) + 1):
            assert shards.tokens(start, stop).tolist() == stream[start:stop]
            assert shards.loss(start, stop).tolist() == [token % 2 for token in stream[start:stop]]
            assert set(shards.document_starts(start, stop).tolist()) == begins & set(range(start, stop))


def test_a_copy_opens_the_directory_again_and_outlives_the_first(tmp_path: Path) -> None:
    first = Shards.open(write(tmp_path / "a"))

    second = copy.deepcopy(first)

    del first
    gc.collect()
    assert [second.document(index).tolist() for index in range(5)] == DOCUMENTS
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(UserError, match=r"a/shards\.json: cannot be read"):
        copy.deepcopy(second)


def test_what_is_outside_the_stream_is_an_index_error(tmp_path: Path) -> None:
    shards = Shards.open(write(tmp_path))

    with pytest.raises(IndexError):
        shards.document(5)
    with pytest.raises(IndexError):
        shards.tokens(3, shards.num_tokens + 1)


def test_a_token_that_does_not_fit_is_never_wrapped(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="65535"):
        write_part(tmp_path, 0, [np.array([70_000])], np.dtype("<u2"))


def refused(directory: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        Shards.open(directory)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", ["tokens-00001.bin", "offsets-00000.bin", "loss-00001.bin"])
def test_a_truncated_or_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, loss=True) / name

    path.write_bytes(path.read_bytes()[:-1])
    assert name in str(refused(tmp_path))
    assert "truncated" in str(refused(tmp_path))
    path.unlink()
    assert name in str(refused(tmp_path))


def test_a_link_to_somewhere_else_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "a")
    tokens = directory / "tokens-00000.bin"
    tokens.rename(tmp_path / "elsewhere")
    tokens.symlink_to(tmp_path / "elsewhere")

    assert "not a plain file" in str(refused(directory))


def test_offsets_that_step_back_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, per_part=5) / "offsets-00000.bin"
    offsets: NDArray[Any] = np.fromfile(path, "<u8")
    offsets[[1, 2]] = 7, 6
    offsets.tofile(path)

    assert "offsets-00000.bin" in str(refused(tmp_path))


@pytest.mark.parametrize("size", [2**62, 2**64, -1, True, 1.5, "4", None])
def test_a_header_that_declares_absurd_sizes_costs_nothing(tmp_path: Path, size: object) -> None:
    path = write(tmp_path) / HEADER_NAME
    content = json.loads(path.read_text())
    content["parts"][1]["num_tokens"] = size
    path.write_text(json.dumps(content))

    before = time.perf_counter()
    message = str(refused(tmp_path))

    assert "part 1" in message or "tokens-00001.bin" in message
    assert time.perf_counter() - before < 1.0  # the bound that the fault list gives


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format_version", 2),
        ("dtype", "uint32"),
        ("vocab_size", "512"),
        ("vocab_size", 2**62),
        ("eos_token_id", None),
        ("source", 3),
        ("parts", []),
        ("parts", [7]),
        ("parts", {"0": {}}),
    ],
)
def test_a_foreign_header_is_named_with_what_is_wrong(tmp_path: Path, key: str, value: object) -> None:
    path = write(tmp_path) / HEADER_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    assert HEADER_NAME in str(refused(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000, "1e999", '"' + "x" * 9_000_000])
def test_a_header_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (write(tmp_path) / HEADER_NAME).write_bytes(text.encode("latin-1"))

    assert HEADER_NAME in str(refused(tmp_path))


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "nowhere" in str(refused(tmp_path / "nowhere"))


def test_a_token_that_the_vocabulary_does_not_have_is_named_with_its_place(tmp_path: Path) -> None:
    shards = Shards.open(write(tmp_path, vocab_size=301))
    path = tmp_path / "tokens-00001.bin"
    stored = np.fromfile(path, "<u2")
    stored[5] ^= 1 << 9  # 300, one below the size of the vocabulary
    stored.tofile(path)

    with pytest.raises(
        UserError, match=r"tokens-00001\.bin: is damaged.* 301 \(found 812 at place 5\)"
    ) as caught:
        shards.tokens(0, shards.num_tokens)

    assert caught.value.exit_code == 4
    assert [shards.document(index).tolist() for index in range(4)] == DOCUMENTS[:4]


@pytest.mark.parametrize("damage", ["vanished", "shrank", "replaced"])
def test_a_file_that_changes_while_mapped_is_noticed_before_it_is_touched(
    tmp_path: Path, damage: str
) -> None:
    shards = Shards.open(write(tmp_path))
    path = tmp_path / "tokens-00001.bin"
    if damage == "shrank":
        with path.open("r+b") as file:
            file.truncate(1)
    else:
        content = path.read_bytes()
        path.rename(tmp_path / "away")
        if damage == "replaced":
            path.write_bytes(content)

    with pytest.raises(UserError, match=rf"tokens-00001.bin: (was )?{damage}") as caught:
        shards.document(3)

    assert caught.value.exit_code == 4
    assert shards.document(0).tolist() == DOCUMENTS[0]
