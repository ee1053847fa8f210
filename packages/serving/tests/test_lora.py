"""A corrected model in the engine, as a ternary file with an adapter or with merged weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bitnet_arch import (
    ConversionConfig,
    convert_bitlinear_to_lrc,
    convert_to_bitnet,
    load_bitnet,
    save_bitnet,
)
from bitnet_arch.bitlinear import bitlinears
from bitnet_arch.lrc import lrc_layers
from bitnet_arch.testing import tiny_llama, tiny_qwen2, tiny_qwen3
from bitnet_serving.engine import Engine
from bitnet_serving.export import export_gguf
from durable import UserError

VOCAB = 320
NUM_POSITIONS = 48
BUILDS: dict[str, tuple[Callable[..., PreTrainedModel], str]] = {
    "llama": (tiny_llama, "none"),
    "bitnet": (tiny_llama, "output"),
    "qwen2": (tiny_qwen2, "none"),
    "qwen3": (tiny_qwen3, "none"),
}
"""Architecture of the file → model, and where it has SubLNs."""


def tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: number for number, text in enumerate([*letters, "th", "the", "<end>"])}
    bpe = Tokenizer(models.BPE(vocab, merges=[("t", "h"), ("th", "e")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


def corrected(directory: Path, architecture: str) -> Path:
    """A checkpoint whose corrections matter, of other ranks in attention than in the MLP."""
    build, subln = BUILDS[architecture]
    model = build(vocab_size=VOCAB, initializer_range=0.2)
    convert_to_bitnet(model, ConversionConfig(subln=subln))
    convert_bitlinear_to_lrc(model, rank=5, exclude_names=["mlp"])
    convert_bitlinear_to_lrc(model, rank=8)
    return save_bitnet(model, directory / "checkpoint", tokenizer=tokenizer())


def log_probs(checkpoint: Path, ids: list[int], *, quantised: bool, correction: bool = True) -> Tensor:
    model = load_bitnet(checkpoint)
    with torch.no_grad():
        for layer in bitlinears(model):
            layer.activation_amount = float(quantised)
        for layer in lrc_layers(model):
            layer.lrc_U.mul_(float(correction))
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


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


@pytest.mark.parametrize("architecture", BUILDS)
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
    model = tiny_llama(vocab_size=VOCAB)
    convert_to_bitnet(model)
    checkpoint = save_bitnet(model, tmp_path / "checkpoint", tokenizer=tokenizer())

    with pytest.raises(UserError, match="has no low-rank corrections"):
        export_gguf(checkpoint, tmp_path / "model.gguf", lora=tmp_path / "lora.gguf")
