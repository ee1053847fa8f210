"""Sizes against hand-counted bytes; the block sizes come from the engines' own layouts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet_serving import FORMATS, read_sizes
from durable import UserError

DTYPE_BYTES = {"F32": 4, "BF16": 2, "U8": 1}
Tensors = dict[str, tuple[str, list[int]]]


def write_checkpoint(directory: Path, tensors: Tensors) -> Path:
    """A model.safetensors with zeros."""
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = DTYPE_BYTES[dtype]
        for length in shape:
            size *= length
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    directory.mkdir(exist_ok=True)
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(end))
    return directory


LATENT: Tensors = {
    "model.embed_tokens.weight": ("F32", [50, 256]),
    "model.layers.0.self_attn.q_proj.weight": ("F32", [512, 256]),
    "model.layers.0.self_attn.q_proj.bias": ("F32", [512]),
    "model.layers.0.mlp.down_proj.weight": ("F32", [256, 512]),
    "model.layers.0.mlp.down_proj.input_norm.weight": ("F32", [512]),
    "model.norm.weight": ("F32", [256]),
    "lm_head.weight": ("F32", [50, 256]),
}


def test_every_tensor_is_counted_in_its_part(tmp_path: Path) -> None:
    sizes = read_sizes(write_checkpoint(tmp_path, LATENT))

    counted = {
        name: (part.num_tensors, part.num_parameters, part.num_bytes) for name, part in sizes.parts.items()
    }
    assert counted == {
        "projections": (2, 262_144, 1_048_576),
        "embeddings": (1, 12_800, 51_200),
        "head": (1, 12_800, 51_200),
        "norms": (2, 768, 3_072),
        "biases": (1, 512, 2_048),
    }
    assert sizes.num_parameters == 289_024
    assert sizes.dense_bytes == 578_048


def test_formats_weigh_what_their_blocks_weigh(tmp_path: Path) -> None:
    sizes = read_sizes(write_checkpoint(tmp_path, LATENT))
    rest = 2 * (289_024 - 262_144)

    weights = {block_format.name: sizes.bytes_in(block_format) for block_format in FORMATS}

    # 262,144 weights are 1,024 blocks of 256, 4,096 of 64, 2,048 of 128; two tensors.
    assert weights == {
        "packed": rest + 65_536 + 2 * 4,
        "tq2_0": rest + 1_024 * 66,
        "tq1_0": rest + 1_024 * 54,
        "q2_0": rest + 4_096 * 18,
        "i2_s": rest + 2_048 * 32 + 2 * 32,
    }


@pytest.mark.parametrize(
    ("width", "fitting"),
    [
        (576, {"packed", "q2_0"}),
        (960, {"packed", "q2_0"}),
        (896, {"packed", "q2_0", "i2_s"}),
        (2048, {"packed", "q2_0", "i2_s", "tq1_0", "tq2_0"}),
        (96, {"packed"}),
    ],
)
def test_a_width_fits_the_formats_whose_block_divides_it(
    tmp_path: Path, width: int, fitting: set[str]
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"

    sizes = read_sizes(write_checkpoint(tmp_path, {name: ("BF16", [8, width])}))

    assert {block_format.name for block_format in FORMATS if not sizes.misfits(block_format)} == fitting


def test_packed_codes_count_four_parameters_a_byte(tmp_path: Path) -> None:
    packed: Tensors = {
        "model.layers.0.mlp.up_proj.weight": ("U8", [128, 256]),
        "model.layers.0.mlp.up_proj.weight_scale": ("F32", [1]),
    }

    sizes = read_sizes(write_checkpoint(tmp_path, packed))

    assert [(each.rows, each.columns) for each in sizes.projections] == [(512, 256)]
    assert sizes.num_parameters == 512 * 256
    assert sizes.stored_bytes == 128 * 256 + 4


def test_projections_that_a_conversion_left_dense_count_as_dense(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LATENT)
    (tmp_path / "bitnet.json").write_text(json.dumps({"ternary": ["model.layers.0.mlp.down_proj"]}))

    sizes = read_sizes(tmp_path)

    assert [each.name for each in sizes.projections] == ["model.layers.0.mlp.down_proj.weight"]
    assert sizes.parts["dense projections"].num_parameters == 512 * 256


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"ternary": 3}'])
def test_a_damaged_record_is_refused(tmp_path: Path, content: str) -> None:
    write_checkpoint(tmp_path, LATENT)
    (tmp_path / "bitnet.json").write_text(content)

    with pytest.raises(UserError, match=r"bitnet\.json: cannot be read"):
        read_sizes(tmp_path)


def test_the_command_prints_sizes_and_ends_with_two_on_bad_input(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LATENT)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bitnet_serving", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    good, missing, unknown = (
        run("sizes", str(tmp_path)),
        run("sizes", str(tmp_path / "nowhere")),
        run("weigh"),
    )

    assert good.returncode == 0
    assert "tq2_0" in good.stdout
    assert (missing.returncode, unknown.returncode) == (2, 2)
    assert missing.stderr.startswith("error: ")
    assert missing.stderr.count("\n") == unknown.stderr.count("\n") == 1
