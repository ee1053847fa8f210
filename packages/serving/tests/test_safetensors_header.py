"""Headers are read without believing them: every kind of damage ends in one error that names the file."""

import json
from pathlib import Path

import pytest

from bitnet_serving import read_checkpoint_header
from bitnet_serving.safetensors_header import read_header
from durable import ExitCode, UserError


def write(path: Path, entries: dict[str, object], *, num_data_bytes: int) -> Path:
    """A safetensors file made from the format's description alone."""
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(num_data_bytes))
    return path


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_names_shapes_and_sizes_are_those_in_the_header(tmp_path: Path) -> None:
    entries = {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", [3, 5], 0, 60),
        "b": entry("BF16", [], 60, 62),
    }

    tensors = read_header(write(tmp_path / "model.safetensors", entries, num_data_bytes=62))

    assert [(tensor.name, tensor.dtype, tensor.shape, tensor.num_bytes) for tensor in tensors] == [
        ("a", "F32", (3, 5), 60),
        ("b", "BF16", (), 2),
    ]


def test_all_shards_of_a_model_are_read_and_other_files_are_not(tmp_path: Path) -> None:
    for number, name in enumerate(("x", "y"), start=1):
        write(
            tmp_path / f"model-0000{number}-of-00002.safetensors",
            {name: entry("I8", [4], 0, 4)},
            num_data_bytes=4,
        )
    write(tmp_path / "train_state.safetensors", {"moment": entry("I8", [4], 0, 4)}, num_data_bytes=4)

    assert [tensor.name for tensor in read_checkpoint_header(tmp_path)] == ["x", "y"]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x02\x00", id="shorter than a length"),
        pytest.param((10**15).to_bytes(8, "little") + b"{}", id="a header larger than the file"),
        pytest.param((2).to_bytes(8, "little") + b"[]", id="a list"),
        pytest.param((2).to_bytes(8, "little") + b"{\xff", id="not text"),
        pytest.param((7).to_bytes(8, "little") + b'{"a":1}', id="no entry"),
        pytest.param((5000).to_bytes(8, "little") + b"[" * 5000, id="nested without end"),
        pytest.param(b"\x80\x04\x95" + bytes(40), id="a pickle"),
    ],
)
def test_what_is_not_safetensors_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)

    with pytest.raises(UserError, match=r"model\.safetensors: damaged") as caught:
        read_header(path)
    assert caught.value.exit_code == ExitCode.BAD_DATA


@pytest.mark.parametrize(
    ("tensor", "num_data_bytes"),
    [
        pytest.param(entry("F32", [3, 5], 0, 60), 59, id="truncated"),
        pytest.param(entry("F32", [3, 5], 0, 60), 61, id="bytes left over"),
        pytest.param(entry("F32", [3, 6], 0, 60), 60, id="a shape that needs more bytes"),
        pytest.param(entry("F32", [-3, -5], 0, 60), 60, id="negative sizes"),
        pytest.param(entry("Q9", [15], 0, 60), 60, id="an unknown dtype"),
        pytest.param(entry("F32", [15], 60, 0), 60, id="backwards"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(
    tmp_path: Path, tensor: dict[str, object], num_data_bytes: int
) -> None:
    path = write(tmp_path / "model.safetensors", {"w": tensor}, num_data_bytes=num_data_bytes)

    with pytest.raises(UserError, match="damaged"):
        read_header(path)


def test_a_directory_without_a_model_says_what_lies_there(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")

    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        read_checkpoint_header(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        read_checkpoint_header(tmp_path / "nowhere")
