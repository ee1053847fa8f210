"""Nothing that a GGUF file claims is believed: each lie ends in one line that names the file."""

import os
import resource
import struct
from pathlib import Path

import pytest
import torch

from bitnet_serving import gguf_reader
from bitnet_serving.gguf_reader import read_gguf
from durable import ExitCode, UserError

U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
TYPE_F32, TYPE_TQ2_0, TYPE_I2_S = 0, 35, 36


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def text(content: bytes) -> bytes:
    return u64(len(content)) + content


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + u32(kind) + value


def entry(name: bytes, dims: list[int], type_id: int, offset: int) -> bytes:
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(type_id) + u64(offset)


def gguf(
    pairs: list[bytes] | None = None,
    entries: list[bytes] | None = None,
    *,
    data: int = 0,
    num_pairs: int | None = None,
    num_entries: int | None = None,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A file made from the format's description alone."""
    pairs, entries = pairs or [], entries or []
    header = b"GGUF" + u32(version)
    header += u64(len(entries) if num_entries is None else num_entries)
    header += u64(len(pairs) if num_pairs is None else num_pairs)
    header += b"".join(pairs + entries)
    return header + bytes(-len(header) % alignment) + bytes(data)


NORM = entry(b"norm", [7], TYPE_F32, 0)  # 28 bytes


@pytest.mark.parametrize(
    ("content", "found"),
    [
        pytest.param(b"", "an empty file", id="empty"),
        pytest.param(b"GGU", "4 bytes announced", id="cut in the magic"),
        pytest.param(b"\x80\x04\x95" + bytes(60), "at its beginning", id="a pickle"),
        pytest.param(gguf(version=2), "version 2", id="an older version"),
        pytest.param(gguf(version=3 << 24), "version 50331648", id="big-endian"),
        pytest.param(gguf(num_pairs=2**63), "announced", id="2^63 keys"),
        pytest.param(gguf(num_entries=2**64 - 1), "announced", id="2^64 tensors"),
        pytest.param(gguf([pair(b"k", U32, u32(1))] * 2), "k twice", id="a key twice"),
        pytest.param(gguf([u64(2**63) + b"k"]), "a key of 9,223", id="a key of 2^63 bytes"),
        pytest.param(gguf([pair(b"\xff", U32, u32(1))]), "a key that is not UTF-8", id="bad UTF-8 in a key"),
        pytest.param(gguf([pair(b"k", STRING, text(b"\xc3("))]), "k that is not UTF-8", id="bad UTF-8"),
        pytest.param(gguf([pair(b"k", STRING, u64(2**40))]), "k of 1,099", id="a string past the end"),
        pytest.param(gguf([pair(b"k", 13, b"")]), "unknown kind 13", id="an unknown kind"),
        pytest.param(gguf([pair(b"k", BOOL, b"\x02")]), "other than 0 and 1", id="a bool of 2"),
        pytest.param(
            gguf([pair(b"k", ARRAY, u32(U32) + u64(2**63))]), "metadata values", id="an array of 2^63"
        ),
        pytest.param(
            gguf([pair(b"k", ARRAY, u32(U32) + u64(10**6))]), "announced", id="an array past the end"
        ),
        pytest.param(
            gguf([pair(b"k", ARRAY, u32(STRING) + u64(10**6))]), "announced", id="strings past the end"
        ),
        pytest.param(
            gguf([pair(b"k", ARRAY, u32(ARRAY) + u64(1) + u32(U32))]), "array of arrays", id="nested"
        ),
        pytest.param(gguf([pair(b"general.alignment", U32, u32(0))]), "alignment of 0", id="alignment 0"),
        pytest.param(gguf([pair(b"general.alignment", U32, u32(48))]), "alignment of 48", id="alignment 48"),
        pytest.param(
            gguf([pair(b"general.alignment", U32, u32(2**31))]), "alignment of", id="alignment 2^31"
        ),
        pytest.param(gguf([pair(b"general.alignment", BOOL, b"\1")]), "as bool", id="alignment as bool"),
        pytest.param(gguf(entries=[text(b"w") + u32(10**6)]), "1000000 dimensions", id="10^6 dimensions"),
        pytest.param(gguf(entries=[entry(b"w" * 64, [7], 0, 0)], data=28), "name of 64", id="a long name"),
        pytest.param(gguf(entries=[entry(b"w", [7, 0], 0, 0)]), "w: 0×7", id="no values"),
        pytest.param(gguf(entries=[entry(b"w", [2**62, 4], 0, 0)]), "w: 4×46", id="2^64 values"),
        pytest.param(gguf(entries=[entry(b"w", [2**62], 0, 0)]), "ends at byte", id="2^62 values"),
        pytest.param(
            gguf(entries=[entry(b"w", [7], 99, 0)], data=28), "unknown type 99", id="an unknown type"
        ),
        pytest.param(
            gguf(entries=[entry(b"w", [128], TYPE_TQ2_0, 0)], data=66), "w: 128 values", id="half a block"
        ),
        pytest.param(
            gguf(entries=[entry(b"w", [576, 2], TYPE_I2_S, 0)], data=320), "w: 2×576", id="I2_S with a tail"
        ),
        pytest.param(gguf(entries=[NORM], data=27), "ends at byte", id="data cut"),
        pytest.param(gguf(entries=[NORM, NORM], data=64), "norm twice", id="a tensor twice"),
        pytest.param(gguf(entries=[entry(b"w", [7], 0, 2**63)], data=28), "at offset", id="past the end"),
        pytest.param(gguf(entries=[entry(b"w", [7], 0, 4)], data=64), "at offset 4", id="not aligned"),
        pytest.param(gguf(entries=[NORM, entry(b"w", [7], 0, 0)], data=64), "where 32 is next", id="overlap"),
        pytest.param(gguf(entries=[NORM, entry(b"w", [7], 0, 64)], data=99), "where 32 is next", id="a gap"),
    ],
)
def test_lies_are_refused_in_one_line_at_once(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)

    with pytest.raises(UserError, match=r"a\.gguf: damaged, or not a GGUF file") as caught:
        read_gguf(path)

    assert found in str(caught.value)
    assert caught.value.exit_code == ExitCode.BAD_DATA


def test_the_same_file_without_a_lie_is_read(tmp_path: Path) -> None:
    pairs = [
        pair(b"general.alignment", U32, u32(64)),
        pair(b"k", ARRAY, u32(I32) + u64(2) + struct.pack("<ii", -1, 5)),
        pair(b"none", ARRAY, u32(STRING) + u64(0)),
        pair(b"e", F32, struct.pack("<f", 0.5)),
    ]
    entries = [NORM, entry(b"w", [256, 2], TYPE_TQ2_0, 64), entry(b"scalar", [], TYPE_F32, 256)]
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf(pairs, entries, data=64 + 192 + 4, alignment=64))

    file = read_gguf(path)

    assert file.metadata == {"general.alignment": 64, "k": [-1, 5], "none": [], "e": 0.5}
    assert file.kinds["none"] == "array of string"
    assert [(each.shape, each.offset % 64, each.num_bytes) for each in file.tensors.values()] == [
        ((7,), 0, 28),
        ((2, 256), 0, 132),
        ((), 0, 4),
    ]


def test_a_header_has_a_limit_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_reader, "MOST_HEADER_BYTES", 100)
    (tmp_path / "a.gguf").write_bytes(gguf([pair(b"k", STRING, text(b"x" * 200))]))

    with pytest.raises(UserError, match="left of at most 100"):
        read_gguf(tmp_path / "a.gguf")


def test_what_is_no_file_is_refused_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    for path in (tmp_path, tmp_path / "pipe", tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no such file"):
            read_gguf(path)


def test_a_file_that_was_cut_since_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf(entries=[NORM], data=28))
    file = read_gguf(path)
    assert torch.equal(file.data("norm"), torch.zeros(28, dtype=torch.uint8))

    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(UserError, match="was cut since"):
        file.data("norm")


def test_a_large_announcement_takes_no_memory(tmp_path: Path) -> None:
    """A sparse file has room for all that its header claims; zeros are empty texts."""
    path = tmp_path / "a.gguf"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    for content in (
        gguf([pair(b"k", ARRAY, u32(U32) + u64(2**30))]),
        gguf([pair(b"k", STRING, u64(2**31))]),
        gguf(num_pairs=2**30),
        gguf(num_entries=2**30),
    ):
        path.write_bytes(content)
        with path.open("r+b") as file:
            file.truncate(2**33)
        with pytest.raises(UserError, match="damaged"):
            read_gguf(path)

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17


def test_texts_that_are_not_there_are_counted(tmp_path: Path) -> None:
    one, cut = text("é".encode()), u64(5) + b"abc"

    for tail, there in ((one + cut, 1), (one + one + b"\0\0", 2)):
        content = gguf([pair(b"k", ARRAY, u32(STRING) + u64(3) + tail)], alignment=1)
        (tmp_path / "a.gguf").write_bytes(content)
        with pytest.raises(UserError, match=f"k: 3 texts announced, {there} there"):
            read_gguf(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(gguf([pair(b"k", ARRAY, u32(STRING) + u64(1) + text(b"\xff"))]))
    with pytest.raises(UserError, match="k that is not UTF-8"):
        read_gguf(tmp_path / "a.gguf")
