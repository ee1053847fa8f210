"""A run that could not be exported never starts; every model that we ship starts with `subln=auto`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import (
    BitNetConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from bitnet_arch import ConversionConfig, convert_to_bitnet, set_quant_amount
from bitnet_arch.testing import TINY_MODELS, tiny_llama, tiny_qwen3
from durable import UserError
from wrinklefree.config import load_config
from wrinklefree.config.schema import SubLNChoice
from wrinklefree.pretrained import described_by
from wrinklefree.run import run
from wrinklefree.training.exporting import choose_subln, first_layers, require_exportable, try_export
from wrinklefree.training.step_memory import skeleton

SMALL = [
    "training.max_seq_length=32",
    "training.batch_size=2",
    "training.gradient_accumulation_steps=1",
    "training.max_steps=1",
    "training.validation.num_batches=0",
    "training.checkpoint.save_at_end=false",
]


def settings(*overrides: str) -> Any:
    return load_config(["model=tiny_llama", "training=base", "data=demo", *SMALL, *overrides])


# gguf-engines.md: llama.cpp's `bitnet` is SiLU, tied, square and without q/k norms, biases or a head.
@pytest.mark.parametrize(
    ("family", "config", "holds"),
    [
        ("llama", {"tie_word_embeddings": True}, True),
        ("llama", {"tie_word_embeddings": False}, False),
        ("llama", {"tie_word_embeddings": True, "head_dim": 8}, False),
        ("qwen2", {"tie_word_embeddings": True}, False),
        ("qwen3", {"tie_word_embeddings": True}, False),
        ("gemma3_text", {}, False),
    ],
)
def test_auto_inserts_norms_where_an_engine_has_them(
    family: str, config: dict[str, Any], holds: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = choose_subln(TINY_MODELS[family](**config), SubLNChoice.auto)

    assert chosen == ("output" if holds else "none")
    assert ("training.auto_convert.subln=auto: none here" in capsys.readouterr().out) is not holds


def shape(*numbers: int) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    return dict(zip(names, numbers, strict=True)) | {
        "num_hidden_layers": 1,
        "vocab_size": 128,
        "tie_word_embeddings": True,
    }


# Widths and heads as published; which norms, biases and activation there are is the class's own.
SHIPPED = {
    "smollm2_135m": LlamaConfig(**shape(576, 1536, 9, 3, 64)),
    "smollm2_360m": LlamaConfig(**shape(960, 2560, 15, 5, 64)),
    "qwen2_0.5b": Qwen2Config(**shape(896, 4864, 14, 2, 64)),
    "qwen3_0.6b": Qwen3Config(**shape(1024, 3072, 16, 8, 128)),
    "qwen3_4b": Qwen3Config(**shape(2560, 9728, 32, 8, 128)),
    "bitnet_2b": BitNetConfig(**shape(2560, 6912, 20, 5, 128)),
    "tiny_llama": described_by("tiny_llama"),
    "tiny_qwen3": described_by("tiny_qwen3"),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_model_that_we_ship_can_be_exported_with_auto(name: str) -> None:
    config = load_config([f"model={name}", "training=stage1_subln"])
    model = skeleton(SHIPPED[name])
    subln = choose_subln(model, config.training.auto_convert.subln)
    convert_to_bitnet(model, ConversionConfig(subln=subln))

    require_exportable(model, config)
    assert subln == ("output" if isinstance(SHIPPED[name], LlamaConfig) else "none")


def test_norms_that_no_engine_has_are_refused_before_training(tmp_path: Path) -> None:
    wanted = ["model=tiny_qwen3", "training.auto_convert.subln=output", f"output_dir={tmp_path}"]

    with pytest.raises(UserError, match=r"export\.target=gguf.*subln=none.*export\.target=hf") as caught:
        run(settings(*wanted))

    assert caught.value.exit_code == 2
    assert run(settings(*wanted, "export.target=hf")).step == 1


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.auto_convert.subln=auto"],
        ["training.lrc.enabled=true"],
        ["training.objectives.dlm={weight: 1}", "training.diffusion.block_size=8"],
        ["model=tiny_qwen3", "training.activation_sparsity.enabled=true"],
    ],
)
def test_a_long_run_begins_with_an_export(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(settings(f"output_dir={tmp_path}", "export.smoke_steps=1", *overrides))

    printed = capsys.readouterr().out
    assert printed.count("export: the first layers were written, read back and loaded") == 1
    assert printed.index("export: the first layers") < printed.index("step 1/1")


def test_a_short_run_and_one_for_transformers_begin_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(settings(f"output_dir={tmp_path / 'short'}"))
    run(settings(f"output_dir={tmp_path / 'hf'}", "export.smoke_steps=1", "export.target=hf"))

    assert "export:" not in capsys.readouterr().out


def test_a_tokenizer_that_no_engine_has_is_found_before_training() -> None:
    model = tiny_llama(vocab_size=3)
    convert_to_bitnet(model)
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unigram, unk_token="<unk>")

    with pytest.raises(UserError, match=r"export\.target=gguf: .*use a BPE tokenizer; export\.target=hf"):
        try_export(model, tokenizer, settings("export.smoke_steps=1"))


def test_the_copy_is_shallow_finished_and_shares_the_weights(tmp_path: Path) -> None:
    model = tiny_qwen3(num_hidden_layers=4)
    convert_to_bitnet(model)
    set_quant_amount(model, 0.25)
    files = first_layers(model)
    files.write(tmp_path)

    config = json.loads((tmp_path / "config.json").read_text())
    record = json.loads((tmp_path / "bitnet.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert len(config.get("layer_types") or [0, 0]) == 2
    assert record["settings"]["quant_amount"] == 1.0
    assert {name.split(".")[2] for name in record["ternary"]} == {"0", "1"}
    tensors = load_file(tmp_path / "model.safetensors")
    expected = {name for name in model.state_dict() if ".layers.2." not in name and ".layers.3." not in name}
    assert tensors.keys() <= expected
    for name, tensor in tensors.items():
        assert torch.equal(tensor, model.state_dict()[name])
    (shared,) = (each for name, each in files.tensors["model.safetensors"].items() if "embed_tokens" in name)
    assert shared.data_ptr() == model.state_dict()["model.embed_tokens.weight"].data_ptr()
