"""A corrected model in the engine, as a ternary file with an adapter or with merged weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitnet_arch import convert_bitlinear_to_lrc, load_bitnet
from bitnet_arch.bitlinear import bitlinears
from bitnet_arch.lrc import lrc_layers
from bitnet_serving.engine import Engine
from bitnet_serving.export import export_gguf
from bitnet_serving.testing import save_tiny
from durable import UserError

VOCAB = 320
NUM_POSITIONS = 48
MODELS = {
    "llama": ("llama", "none"),
    "bitnet": ("llama", "output"),
    "qwen2": ("qwen2", "none"),
    "qwen3": ("qwen3", "none"),
}
"""Architecture of the file → family, and where it has SubLNs."""


def corrected(directory: Path, architecture: str) -> Path:
    """A checkpoint whose corrections matter, of other ranks in attention than in the MLP."""
    family, subln = MODELS[architecture]
    return save_tiny(
        directory / "checkpoint",
        family,
        convert={"subln": subln},
        change=correct,
        vocab_size=VOCAB,
        initializer_range=0.2,
    )


def correct(model: nn.Module) -> None:
    convert_bitlinear_to_lrc(model, rank=5, exclude_names=["mlp"])
    convert_bitlinear_to_lrc(model, rank=8)


def log_probs(checkpoint: Path, ids: list[int], *, quantised: bool, correction: bool = True) -> Tensor:
    model = load_bitnet(checkpoint)
    with torch.no_grad():
        for layer in bitlinears(model):
            layer.activation_amount = float(quantised)
        for layer in lrc_layers(model):
            layer.lrc_U.mul_(float(correction))
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits.double().log_softmax(-1)


def engine_log_probs(path: Path, ids: list[int], *, lora: Path | None = None) -> Tensor:
    rows = torch.full((len(ids), VOCAB), float("nan"), dtype=torch.double)
    with Engine(path, lora=lora) as engine:
        for row, top in zip(rows, engine.next_log_probs(ids, range(len(ids)), VOCAB), strict=True):
            row[top.ids] = torch.tensor(top.log_probs, dtype=torch.double)
    return rows


def divergence(expected: Tensor, found: Tensor) -> float:
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.fixture(scope="module")
def ids() -> list[int]:
    generator = torch.Generator().manual_seed(0)
    drawn: list[int] = torch.randint(VOCAB, (NUM_POSITIONS,), generator=generator).tolist()
    return drawn


@pytest.mark.parametrize("architecture", MODELS)
def test_an_adapter_corrects_a_model_in_the_engine(tmp_path: Path, architecture: str, ids: list[int]) -> None:
    checkpoint = corrected(tmp_path, architecture)
    expected = log_probs(checkpoint, ids, quantised=False)
    without = log_probs(checkpoint, ids, quantised=False, correction=False)
    gguf, lora = tmp_path / "model.gguf", tmp_path / "lora.gguf"

    report = export_gguf(checkpoint, gguf, body="f16", lora=lora)

    assert report.architecture == architecture
    assert divergence(expected, without) > 1e-3, "corrections that change nothing show nothing"
    assert divergence(expected, engine_log_probs(gguf, ids, lora=lora)) <= 1e-5
    assert divergence(without, engine_log_probs(gguf, ids)) <= 1e-5


@pytest.mark.parametrize("body", ["tq2_0", "q8_0"])
@pytest.mark.parametrize("architecture", ["llama", "bitnet"])
def test_the_adapter_of_a_padded_model_is_padded(
    tmp_path: Path, architecture: str, body: str, ids: list[int]
) -> None:
    checkpoint = corrected(tmp_path, architecture)
    expected = log_probs(checkpoint, ids, quantised=True)
    # What int8 activations do to PyTorch's own model; the engine has int8 activations of another grain.
    own = divergence(expected, log_probs(checkpoint, ids, quantised=False))
    gguf, lora = tmp_path / "model.gguf", tmp_path / "lora.gguf"

    report = export_gguf(checkpoint, gguf, body=body, embeddings="f16", lora=lora)

    assert report.padding.is_needed
    found = divergence(expected, engine_log_probs(gguf, ids, lora=lora))
    without = divergence(expected, engine_log_probs(gguf, ids))
    assert found <= 2 * own
    assert without > 10 * own


@pytest.mark.parametrize("architecture", ["llama", "bitnet"])
def test_merged_corrections_need_no_adapter(tmp_path: Path, architecture: str, ids: list[int]) -> None:
    checkpoint = corrected(tmp_path, architecture)

    export_gguf(checkpoint, tmp_path / "model.gguf", body="f16", merge_lrc=True)

    expected = log_probs(checkpoint, ids, quantised=False)
    assert divergence(expected, engine_log_probs(tmp_path / "model.gguf", ids)) <= 1e-5


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        pytest.param({}, "has low-rank corrections", id="dropped"),
        pytest.param({"merge_lrc": True}, "tq2_0 holds ternary weights", id="merged into ternary weights"),
        pytest.param({"merge_lrc": True, "lora": "lora.gguf"}, "added once", id="twice"),
        pytest.param({"lora": "lora.gguf", "scales": "tensors"}, "a scale that has a tensor", id="scales"),
        pytest.param({"lora": "lora.gguf", "body": "bf16"}, "a scale that has a tensor", id="bf16"),
    ],
)
def test_a_correction_that_would_be_lost_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UserError, match=complaint):
        export_gguf(corrected(tmp_path, "llama"), "model.gguf", **settings)
    assert not list(tmp_path.glob("*.gguf"))


def test_an_adapter_for_nothing_is_refused(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "checkpoint")

    with pytest.raises(UserError, match="has no low-rank corrections"):
        export_gguf(checkpoint, tmp_path / "model.gguf", lora=tmp_path / "lora.gguf")
