"""The names of earlier versions, and that what was wrong behind them is not wrong here."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.integrations.bitnet import AutoBitLinear

from bitnet_arch.bitlinear import BitLinear, set_quant_amount
from bitnet_arch.checkpoint import load_bitnet, load_packed
from bitnet_arch.lrc import BitLinearLRC
from bitnet_arch.quant import quantize_weight
from bitnet_arch.seed_names import (
    auto_convert_if_needed,
    convert_linear_to_bitlinear,
    convert_model_to_bitnet,
    is_bitnet_model,
    run_stage1,
)
from bitnet_arch.testing import tiny_llama, tiny_qwen2
from durable import UserError

IDS = torch.arange(3, 19)[None]


class ToyLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        )
        self.mlp = nn.ModuleDict(
            {"gate_proj": nn.Linear(8, 12), "up_proj": nn.Linear(8, 12), "down_proj": nn.Linear(12, 8)}
        )


class ToyModel(nn.Module):
    """Named like a Llama, and no transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([ToyLayer(), ToyLayer()])
        self.lm_head = nn.Linear(8, 16)


def ternary_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, BitLinear)}


def test_a_bare_linear_comes_back_ternary_over_the_same_parameters() -> None:
    linear = nn.Linear(5, 3)

    layer = convert_linear_to_bitlinear(linear)

    assert isinstance(layer, BitLinear)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias


def test_children_are_converted_but_for_excluded_names() -> None:
    module = nn.ModuleDict(
        {"a": nn.Linear(4, 4), "b": nn.Sequential(nn.Linear(4, 2), nn.ReLU()), "c": nn.Linear(2, 2)}
    )

    result = convert_linear_to_bitlinear(module, exclude_names=["c"])

    assert result is module
    assert ternary_names(module) == {"a", "b.0"}


def test_a_layer_in_two_places_stays_one() -> None:
    shared = nn.Linear(4, 4)
    module = nn.ModuleDict({"a": shared, "b": shared})

    convert_linear_to_bitlinear(module)

    assert module["a"] is module["b"]
    assert isinstance(module["a"], BitLinear)


def test_the_head_of_a_language_model_is_left_out() -> None:
    model = tiny_llama()

    convert_linear_to_bitlinear(model)

    assert type(model.lm_head) is nn.Linear
    assert len(ternary_names(model)) == 14


def test_a_module_without_linear_layers_is_an_error_not_a_silence() -> None:
    with pytest.raises(UserError, match="nothing to convert"):
        convert_linear_to_bitlinear(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)))


def test_a_pretrained_decoder_gets_subln_in_front_of_its_output_projections() -> None:
    model: Any = tiny_llama()
    embedding, head = model.model.embed_tokens, model.lm_head

    result = convert_model_to_bitnet(model, 64, 176)

    assert result is model
    normed = {name for name in ternary_names(model) if model.get_submodule(name).input_norm is not None}
    assert {name.rpartition(".")[2] for name in normed} == {"o_proj", "down_proj"}
    assert len(normed) == 4
    assert model.model.embed_tokens is embedding
    assert model.lm_head is head


def test_names_that_are_never_converted_may_be_excluded() -> None:
    names = ["embed_tokens", "lm_head", "embed_positions", "k_proj"]

    model = convert_model_to_bitnet(tiny_llama(), 64, 176, names, insert_subln=False)

    assert len(ternary_names(model)) == 12


def test_a_toy_of_ones_own_is_converted_by_names() -> None:
    model = convert_model_to_bitnet(ToyModel(), 8, 12, exclude_layers=["layers.1.mlp"])

    assert len(ternary_names(model)) == 11
    assert type(model.lm_head) is nn.Linear
    down: Any = model.get_submodule("layers.0.mlp.down_proj")
    assert down.input_norm.hidden_size == 12


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(
            lambda: GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16)), id="gpt2"
        ),
        pytest.param(lambda: nn.Sequential(nn.Linear(8, 8)), id="no projections"),
    ],
)
def test_an_architecture_that_cannot_be_converted_is_an_error_not_a_silence(model: Any) -> None:
    with pytest.raises(UserError):
        convert_model_to_bitnet(model(), 8, 32)


@pytest.mark.parametrize(
    ("sizes", "fragment"), [((96, 176), "hidden_size"), ((64, 100), "intermediate_size")]
)
def test_sizes_of_another_model_are_refused_before_anything_changes(
    sizes: tuple[int, int], fragment: str
) -> None:
    model = tiny_llama()

    with pytest.raises(UserError, match=fragment):
        convert_model_to_bitnet(model, *sizes)

    assert not is_bitnet_model(model)


def test_biases_keep_the_dtype_of_the_model() -> None:
    model: Any = tiny_qwen2()
    model.bfloat16()

    convert_model_to_bitnet(model, 56, 144)

    assert model.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16
    assert model(IDS).logits.dtype == torch.bfloat16


def test_a_bf16_model_has_the_codes_of_its_fp32_copy() -> None:
    weight = tiny_llama().model.layers[0].mlp.up_proj.weight.detach().bfloat16()

    low, high = quantize_weight(weight), quantize_weight(weight.float())

    assert torch.equal(low.codes, high.codes)
    assert torch.equal(low.scale, high.scale)


def test_auto_conversion_inserts_no_subln_and_keeps_a_pretrained_models_function() -> None:
    model: Any = tiny_llama()
    with torch.no_grad():
        expected = model(IDS).logits

    auto_convert_if_needed(model, 64, 176)

    set_quant_amount(model, 0.0)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)


def test_subln_with_gains_of_one_warns_and_calibrated_gains_do_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        convert_model_to_bitnet(tiny_llama(), 64, 176, calibration_batches=[IDS])
    assert not caplog.records

    with caplog.at_level(logging.WARNING):
        convert_model_to_bitnet(tiny_llama(), 64, 176)
    assert "calibration_batches" in caplog.text


def test_auto_conversion_returns_a_ternary_model_as_it_is() -> None:
    model = convert_model_to_bitnet(tiny_llama(), 64, 176)
    before = dict(model.named_modules())

    assert auto_convert_if_needed(model, 64, 176) is model
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(8, 8), False),
        (BitLinear(8, 8), True),
        (BitLinearLRC(8, 8, rank=2), True),
        (AutoBitLinear(8, 8, online_quant=True), True),
    ],
)
def test_every_kind_of_ternary_layer_counts(layer: nn.Module, expected: bool) -> None:
    assert is_bitnet_model(nn.Sequential(nn.Sequential(layer))) is expected


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    model: Any = tiny_llama(vocab_size=96)
    model.bfloat16()
    model.save_pretrained(tmp_path / "pretrained")
    vocabulary = {f"word{index}": index for index in range(96)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="word0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="word0").save_pretrained(
        tmp_path / "pretrained"
    )
    return tmp_path / "pretrained"


def test_stage_one_leaves_a_directory_that_loads(pretrained: Path, tmp_path: Path) -> None:
    directory = run_stage1(str(pretrained), tmp_path / "stage1", 64, 176)

    model: Any = load_bitnet(directory)
    assert is_bitnet_model(model)
    assert model.dtype == torch.bfloat16
    # The tied head is one tensor, and stays one.
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert AutoConfig.from_pretrained(directory).model_type == "llama"
    assert (directory / "tokenizer.json").is_file()
    assert json.loads((directory / "bitnet.json").read_text())["subln"]["placement"] == "output"
    assert len(load_packed(directory)) == 14


def test_stage_one_writes_no_pickles(pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pickle.*found pytorch.*safetensors") as caught:
        run_stage1(str(pretrained), tmp_path / "stage1", 64, 176, save_format="pytorch")

    assert caught.value.exit_code == 2
    assert not (tmp_path / "stage1").exists()


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_stage_one_names_a_model_that_is_not_there(content: str | None, tmp_path: Path) -> None:
    source = tmp_path / "nothing"
    if content is not None:
        source.mkdir()
        (source / "config.json").write_text(content)

    with pytest.raises(UserError, match="nothing: cannot be loaded") as caught:
        run_stage1(str(source), tmp_path / "stage1", 64, 176)

    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
