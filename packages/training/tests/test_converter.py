"""`wrinklefree.serving.converter`: names and arguments of earlier documents, over `bitnet_serving`."""

import importlib
from pathlib import Path

import pytest

from bitnet_serving.export import export_gguf
from bitnet_serving.gguf_reader import read_gguf
from bitnet_serving.testing import save_tiny
from wrinklefree.serving.converter import convert_dense_to_fake_moe_gguf, convert_to_gguf


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("made") / "model")


def test_a_checkpoint_is_converted_as_export_does(checkpoint: Path, tmp_path: Path) -> None:
    export_gguf(checkpoint, tmp_path / "exported.gguf", body="i2_s")
    output = tmp_path / "model.gguf"
    output.write_text("an earlier one")

    written = convert_to_gguf(
        model_path=checkpoint / "model.safetensors", output_path=output, quant_type="i2_s"
    )

    assert written == output
    assert output.read_bytes() == (tmp_path / "exported.gguf").read_bytes()


def test_the_default_is_i2_s_and_the_name_is_in_the_file(checkpoint: Path, tmp_path: Path) -> None:
    convert_to_gguf(checkpoint, tmp_path / "model.gguf", model_name="my model")

    # 40 is what Microsoft's engine calls its files of i2_s.
    metadata = read_gguf(tmp_path / "model.gguf").metadata
    assert (metadata["general.file_type"], metadata["general.name"]) == (40, "my model")


def test_a_dense_checkpoint_gets_experts(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "moe.gguf"

    written = convert_dense_to_fake_moe_gguf(checkpoint, output, num_experts=4, top_k=2, quant_type="f16")

    file = read_gguf(written)
    assert (file.metadata["llama.expert_count"], file.metadata["llama.expert_used_count"]) == (4, 2)
    dense = (176, 64)  # rows and columns of tiny_llama's gate
    assert file.tensors["blk.0.ffn_gate_exps.weight"].shape == (4, *dense)
    assert file.tensors["blk.0.ffn_gate_inp.weight"].shape == (4, 64)


def test_models_with_experts_of_their_own_are_not_offered() -> None:
    converter = importlib.import_module("wrinklefree.serving.converter")

    with pytest.raises(ImportError, match="come later"):
        from wrinklefree.serving.converter import convert_moe_to_gguf  # noqa: F401

    assert "convert_moe_to_gguf" not in converter.__all__
