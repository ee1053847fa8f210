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


def test_data_is_where_the_header_says(tmp_path: Path) -> None:
    entries: dict[str, object] = {"late": entry("I8", [3], 4, 7), "early": entry("I8", [4], 0, 4)}
    path = write(tmp_path / "model.safetensors", entries, num_data_bytes=0)
    path.write_bytes(path.read_bytes() + b"earlate")

    stored = {tensor.name: tensor for tensor in read_header(path)}

    content = path.read_bytes()
    assert [content[stored[n].offset :][: stored[n].num_bytes] for n in ("early", "late")] == [
        b"earl",
        b"ate",
    ]
    assert stored["late"].path == path


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param({"a": entry("I8", [4], 0, 4), "b": entry("I8", [4], 2, 6)}, id="overlap"),
        pytest.param({"a": entry("I8", [2], 0, 2), "b": entry("I8", [2], 4, 6)}, id="a gap"),
        pytest.param({"a": entry("I8", [6, 2**62, 4], 0, 6)}, id="2^64 values"),
        pytest.param({"a": entry("I8", [2**62] * 60_000, 0, 6)}, id="a product of a million digits"),
        pytest.param({"a": entry("I8", [float("inf")], 0, 6)}, id="infinite"),  # type: ignore[list-item]
        pytest.param({"a": entry("I8", ["6"], 0, 6)}, id="a number as text"),  # type: ignore[list-item]
        pytest.param({"a": entry("I8", [True, 6], 0, 6)}, id="true"),
        pytest.param({"a": {"dtype": [], "shape": [6], "data_offsets": [0, 6]}}, id="a dtype as list"),
        pytest.param({"a": {"dtype": "I8", "shape": 6, "data_offsets": [0, 6]}}, id="a shape as number"),
    ],
)
def test_shapes_and_places_that_cannot_be_are_refused(tmp_path: Path, entries: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors: damaged") as caught:
        read_header(write(tmp_path / "model.safetensors", entries, num_data_bytes=6))
    assert caught.value.exit_code == ExitCode.BAD_DATA


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    one = '"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}'
    header = f"{{{one},{one}}}".encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x")

    with pytest.raises(UserError, match="damaged"):
        read_header(tmp_path / "model.safetensors")


def write_shards(directory: Path, places: dict[str, int], *, count: int) -> None:
    for number in sorted(set(places.values())):
        names = [name for name, place in places.items() if place == number]
        entries: dict[str, object] = {
            name: entry("I8", [4], 4 * n, 4 * n + 4) for n, name in enumerate(names)
        }
        path = directory / f"model-{number:05d}-of-{count:05d}.safetensors"
        write(path, entries, num_data_bytes=4 * len(names))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, {"x": 1, "z": 3}, count=3)

    with pytest.raises(
        UserError, match=r"model-00002-of-00003\.safetensors: this shard is missing"
    ) as caught:
        read_checkpoint_header(tmp_path)
    assert caught.value.exit_code == ExitCode.BAD_DATA


def test_shards_of_two_models_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, {"x": 1, "y": 2}, count=2)
    write_shards(tmp_path, {"x": 1}, count=1)

    with pytest.raises(UserError, match="files of several models"):
        read_checkpoint_header(tmp_path)


@pytest.mark.parametrize(
    "places",
    [
        {"x": "model-00001-of-00002.safetensors"},
        {"x": "model-00001-of-00002.safetensors", "y": "model-00001-of-00002.safetensors"},
        {"x": "model-00001-of-00002.safetensors", "y": "../../y.safetensors"},
        {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors", "z": "z"},
        ["x"],
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, places: object) -> None:
    write_shards(tmp_path, {"x": 1, "y": 2}, count=2)
    honest = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": honest}))
    assert len(read_checkpoint_header(tmp_path)) == 2

    index.write_text(json.dumps({"weight_map": places}))

    with pytest.raises(UserError, match=r"index\.json: damaged") as caught:
        read_checkpoint_header(tmp_path)
    assert caught.value.exit_code == ExitCode.BAD_DATA


def test_a_directory_without_a_model_says_what_lies_there(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")

    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        read_checkpoint_header(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        read_checkpoint_header(tmp_path / "nowhere")
