"""Every family in every type, in widths that blocks hold and in widths that are padded for them: written,
read back, run in the engine, compared with PyTorch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitnet_arch import convert_bitlinear_to_lrc
from bitnet_serving.export import export_gguf
from bitnet_serving.testing import save_tiny
from bitnet_serving.verify import verify_gguf

POSITIONS = 32
WIDE = {"hidden_size": 256, "intermediate_size": 512}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"subln": "none", "tie_word_embeddings": False}, {}),
    "tied llama with SubLN": ("llama", {"subln": "output"}, {}),
    "qwen2": ("qwen2", {"subln": "none"}, HEADS),
    "qwen3": ("qwen3", {"subln": "none"}, {"head_dim": 64}),
    "gemma3": ("gemma3_text", {"subln": "none"}, HEADS | {"head_dim": 64, "query_pre_attn_scalar": 64}),
}
"""Name → family, what it is, and what makes its widths multiples of 256."""
BODIES = ("tq2_0", "f16", *(pytest.param(body, marks=pytest.mark.slow) for body in ("tq1_0", "q8_0")))

Checkpoint = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Each model and width is made once."""
    made: dict[tuple[str, str], Path] = {}

    def checkpoint_of(name: str, width: str) -> Path:
        if (name, width) not in made:
            family, settings, widths = MODELS[name]
            config = dict(settings) | (WIDE | widths if width == "divisible" else {})
            convert = {"subln": config.pop("subln")}
            directory = tmp_path_factory.mktemp("matrix") / "model"
            made[name, width] = save_tiny(directory, family, convert=convert, **config)
        return made[name, width]

    return checkpoint_of


@pytest.mark.parametrize("width", ["divisible", "padded"])
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", MODELS)
def test_the_engine_predicts_what_pytorch_does(
    name: str, body: str, width: str, checkpoint_of: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(name, width)
    report = export_gguf(checkpoint, tmp_path / "model.gguf", body=body)

    verification = verify_gguf(tmp_path / "model.gguf", checkpoint, positions=POSITIONS)

    assert report.padding.is_needed == (width == "padded" and body != "f16")
    assert verification.ok, str(verification)
    assert verification.engine is not None
    assert verification.engine.num_positions == POSITIONS


@pytest.mark.parametrize(("body", "scales"), [("tq2_0", "tensors"), ("q2_0", "blocks"), ("bf16", "blocks")])
def test_other_types_and_scales_apart_are_proven_too(
    body: str, scales: str, checkpoint_of: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of("tied llama with SubLN", "divisible")
    export_gguf(checkpoint, tmp_path / "model.gguf", body=body, scales=scales)

    verification = verify_gguf(tmp_path / "model.gguf", checkpoint, positions=POSITIONS)

    assert verification.ok, str(verification)


@pytest.mark.parametrize("body", ["tq2_0", "f16"])
def test_a_model_with_corrections_is_proven_with_its_adapter(body: str, tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "model", change=lambda model: convert_bitlinear_to_lrc(model, rank=4))
    path, adapter = tmp_path / "model.gguf", tmp_path / "adapter.gguf"
    export_gguf(checkpoint, path, body=body, lora=adapter)

    corrected = verify_gguf(path, checkpoint, positions=POSITIONS, lora=adapter)

    assert corrected.ok, str(corrected)


def test_merged_corrections_are_proven_without_one(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "model", change=lambda model: convert_bitlinear_to_lrc(model, rank=4))
    export_gguf(checkpoint, tmp_path / "model.gguf", body="f16", merge_lrc=True)

    verification = verify_gguf(tmp_path / "model.gguf", checkpoint, positions=POSITIONS)

    assert verification.ok, str(verification)


def test_a_dropped_mask_row_is_left_out_on_both_sides(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "model", mask=300, vocab_size=301)
    export_gguf(checkpoint, tmp_path / "model.gguf", body="f16")

    verification = verify_gguf(tmp_path / "model.gguf", checkpoint, positions=POSITIONS)

    assert verification.ok, str(verification)
    assert verification.engine is not None
    assert verification.engine.num_named == 300
