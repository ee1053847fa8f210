"""The file is read back by `gguf`, llama.cpp's own reader; what must be in it is computed here."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitnet_arch import (
    convert_bitlinear_to_lrc,
    set_quant_amount,
    set_sparsity,
    set_subln_amount,
)
from bitnet_arch.quant import quantize_weight
from bitnet_arch.sparsity import Sparsity
from bitnet_serving.export import export_gguf
from bitnet_serving.testing import CHAT_TEMPLATE, byte_level_tokenizer, save_tiny
from durable import UserError, publish

MakeCheckpoint = Callable[..., Path]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
"""A multiple of every block."""
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {"tie_word_embeddings": False}),
    "bitnet": ("llama", {"subln": "output"}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {}, {"head_dim": 128}),
    "gemma3": ("gemma3_text", {}, {"head_dim": 64, "query_pre_attn_scalar": 64}),
    "bitnet-b1.58": ("bitnet", {}, {}),
}
"""Architecture → family, conversion and configuration that it is for."""


@pytest.fixture(scope="module")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """`save_tiny`; what was asked for before is not made again, so nobody changes it."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", **wanted: Any) -> Path:
        if {"change", "tokenizer"} & wanted.keys():  # nothing that says what they are
            return save_tiny(tmp_path_factory.mktemp("made") / family, family, **wanted)
        key = json.dumps([family, wanted], sort_keys=True)
        if key not in made:
            made[key] = save_tiny(tmp_path_factory.mktemp("made") / family, family, **wanted)
        return made[key]

    return make


def checkpoint_for(make_checkpoint: MakeCheckpoint, architecture: str) -> Path:
    family, convert, config = MODELS[architecture]
    return make_checkpoint(family, convert=convert, **WIDE | config)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of a file by key, tensors by name."""
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def values(tensor: Any) -> Tensor:
    """The numbers of a tensor, dequantised by `gguf`."""
    return torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))


def permuted(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's converter, for Llama: rotated halves of a head become neighbours."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize(
    ("architecture", "body"),
    [
        *((architecture, "tq2_0") for architecture in MODELS),
        *(("llama", body) for body in ("tq1_0", "f16", "bf16", "q8_0")),
    ],
)
def test_every_code_and_scale_is_the_checkpoints(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, architecture: str, body: str
) -> None:
    checkpoint = checkpoint_for(make_checkpoint, architecture)
    stored = load_file(checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text())

    report = export_gguf(checkpoint, tmp_path / "model.gguf", body=body)

    assert report.architecture == architecture
    assert not report.padding.is_needed
    fields, tensors = read(tmp_path / "model.gguf")
    assert fields["general.architecture"] == architecture
    for layer in range(config["num_hidden_layers"]):
        for path, role in NAMES.items():
            codes, scale = quantize_weight(stored[f"model.layers.{layer}.{path}.weight"])
            if architecture == "llama" and role in ("attn_q", "attn_k"):
                heads = config["num_attention_heads" if role == "attn_q" else "num_key_value_heads"]
                codes = permuted(codes, heads)
            found = values(tensors[f"blk.{layer}.{role}.weight"])
            # fp16 in the blocks; in bf16 the scale has a tensor of its own.
            in_blocks = scale.half().float() if body != "bf16" else torch.tensor(1.0)
            assert torch.equal(found, codes.float() * in_blocks), f"{layer} {role}"
            if body == "bf16":
                assert values(tensors[f"blk.{layer}.{role}.scale"]).item() == scale.item()
    assert report.largest_scale_error <= 2**-11


@pytest.mark.parametrize("architecture", MODELS)
def test_what_is_not_ternary_is_the_checkpoints_too(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, architecture: str
) -> None:
    checkpoint = checkpoint_for(make_checkpoint, architecture)
    stored = load_file(checkpoint / "model.safetensors")
    offset = 1.0 if architecture == "gemma3" else 0.0
    gemma = architecture == "gemma3"
    sub_norms = {"self_attn.o_proj.input_norm": "attn_sub_norm", "mlp.down_proj.input_norm": "ffn_sub_norm"}
    names = {
        "input_layernorm": "attn_norm",
        ("pre_feedforward_layernorm" if gemma else "post_attention_layernorm"): "ffn_norm",
        **({"post_attention_layernorm": "post_attention_norm"} if gemma else {}),
        **({"post_feedforward_layernorm": "post_ffw_norm"} if gemma else {}),
        **(sub_norms if architecture.startswith("bitnet") else {}),
        **(
            {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
            if architecture in ("qwen3", "gemma3")
            else {}
        ),
    }

    export_gguf(checkpoint, tmp_path / "model.gguf", body="tq2_0", embeddings="f32")

    _, tensors = read(tmp_path / "model.gguf")
    assert torch.equal(values(tensors["token_embd.weight"]), stored["model.embed_tokens.weight"])
    assert ("output.weight" in tensors) == ("lm_head.weight" in stored)
    if "lm_head.weight" in stored:
        assert torch.equal(values(tensors["output.weight"]), stored["lm_head.weight"])
    assert torch.equal(values(tensors["output_norm.weight"]), stored["model.norm.weight"] + offset)
    for hf, role in names.items():
        found = values(tensors[f"blk.1.{role}.weight"])
        assert torch.equal(found, stored[f"model.layers.1.{hf}.weight"] + offset), role
    if architecture == "qwen2":
        found = values(tensors["blk.1.attn_k.bias"])
        assert torch.equal(found, stored["model.layers.1.self_attn.k_proj.bias"])
    # Nothing is left over, on either side.
    expected = len(stored) - ("lm_head.weight" in stored and architecture in ("bitnet", "gemma3"))
    assert len(tensors) == expected


@pytest.mark.parametrize("architecture", MODELS)
def test_every_number_in_the_metadata_is_the_configurations(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, architecture: str
) -> None:
    checkpoint = checkpoint_for(make_checkpoint, architecture)
    config = json.loads((checkpoint / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config["rope_parameters"]

    export_gguf(checkpoint, tmp_path / "model.gguf", body="tq2_0")

    fields, _ = read(tmp_path / "model.gguf")
    expected = {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": np.float32(config["rms_norm_eps"]),
        "rope.dimension_count": head_dim,
        "rope.freq_base": rope.get("full_attention", rope)["rope_theta"],
    }
    if architecture == "gemma3":
        expected |= {
            "attention.sliding_window": config["sliding_window"],
            "attention.sliding_window_pattern": 2,
            "rope.freq_base_swa": rope["sliding_attention"]["rope_theta"],
        }
    found = {key: value for key, value in fields.items() if key.startswith(f"{architecture}.")}
    assert found == {f"{architecture}.{key}": value for key, value in expected.items()}
    assert fields["general.file_type"] == 37  # LLAMA_FTYPE_MOSTLY_TQ2_0
    assert fields["tokenizer.chat_template"] == CHAT_TEMPLATE


def test_a_file_says_where_it_comes_from(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    saved = make_checkpoint()
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step_000007").symlink_to(saved)
    (run / "fingerprint.json").write_text(json.dumps({"fingerprint": "f00d"}))
    manifest = json.loads((saved / "manifest.json").read_text())
    sha256 = {file["path"]: file["sha256"] for file in manifest["files"]}["model.safetensors"]

    export_gguf(run / "checkpoints" / "step_000007", tmp_path / "model.gguf", body="f16")

    fields, _ = read(tmp_path / "model.gguf")
    assert fields["wrinklefree.run_fingerprint"] == "f00d"
    assert fields["wrinklefree.model_sha256"] == sha256


def test_a_run_is_exported_at_its_newest_checkpoint(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for step, family in ((5, "llama"), (12, "qwen3")):
        (checkpoints / f"step_{step:06}").symlink_to(make_checkpoint(family))

    report = export_gguf(tmp_path / "run", tmp_path / "model.gguf", body="f16")

    assert report.architecture == "qwen3"
    assert capsys.readouterr().out == f"newest checkpoint: {checkpoints / 'step_000012'}\n"


@pytest.mark.parametrize("save", [{"layout": "stock"}, {"layout": "stock", "packed": True}])
@pytest.mark.parametrize("subln", ["none", "output"])
def test_every_layout_of_a_model_gives_the_same_tensors(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, save: dict[str, Any], subln: str
) -> None:
    training = make_checkpoint(convert={"subln": subln})
    stock = make_checkpoint(convert={"subln": subln}, save=save)

    for directory, name in ((training, "training"), (stock, "stock")):
        export_gguf(directory, tmp_path / name, body="q8_0")

    (_, one), (_, other) = read(tmp_path / "training"), read(tmp_path / "stock")
    assert one.keys() == other.keys()
    for name in one:
        assert np.array_equal(one[name].data, other[name].data), name


def test_two_exports_are_the_same_bytes(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("qwen3")

    for name in ("one", "other"):
        export_gguf(checkpoint, tmp_path / name)

    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_without_a_type_the_fastest_is_padded_or_the_smallest_chosen(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    # Rows of 576 as SmolLM2-135M's: three blocks of 256 would hold 768.
    checkpoint = make_checkpoint(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3
    )

    fast = export_gguf(checkpoint, tmp_path / "fast.gguf")
    small = export_gguf(checkpoint, tmp_path / "small.gguf", prefer="size")

    assert fast.types["projections"] == "tq2_0"
    assert "hidden 576, heads 9/3, ffn 1536 → hidden 768" in str(fast)
    assert small.types["projections"] != "tq2_0"
    assert (tmp_path / "small.gguf").stat().st_size < (tmp_path / "fast.gguf").stat().st_size
    assert "slowly than tq2_0" in str(small)


@pytest.mark.parametrize("option", [{}, {"keep_mask": True}])
def test_the_row_of_mask_goes_unless_it_is_kept(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, option: dict[str, Any]
) -> None:
    tokenizer = byte_level_tokenizer(vocab_size=299)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    checkpoint = make_checkpoint(mask=299, tokenizer=tokenizer, tie_word_embeddings=False)

    export_gguf(checkpoint, tmp_path / "model.gguf", body="f16", **option)

    fields, tensors = read(tmp_path / "model.gguf")
    rows = 300 if option else 299
    assert list(tensors["token_embd.weight"].shape) == [64, rows]
    assert list(tensors["output.weight"].shape) == [64, rows]
    assert fields["llama.vocab_size"] == len(fields["tokenizer.ggml.tokens"]) == rows
    assert ("[MASK]" in fields["tokenizer.ggml.tokens"]) == bool(option)
    assert ("tokenizer.ggml.mask_token_id" in fields) == bool(option)


def test_a_mask_in_the_middle_stays_so_that_ids_do(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    report = export_gguf(make_checkpoint(mask=7), tmp_path / "model.gguf", body="f16")

    assert "[MASK] is token 7" in str(report)
    assert read(tmp_path / "model.gguf")[0]["llama.vocab_size"] == 300


def test_scales_that_fp16_would_lose_have_tensors_of_their_own(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    def shrink(model: nn.Module) -> None:
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(2e-4)  # scale 3e-6: EPS is above

    checkpoint = make_checkpoint(change=shrink)
    scale = quantize_weight(
        load_file(checkpoint / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    ).scale

    report = export_gguf(checkpoint, tmp_path / "model.gguf", body="q8_0")

    _, tensors = read(tmp_path / "model.gguf")
    assert abs(scale.half().float() / scale - 1) > 2**-11
    assert values(tensors["blk.1.ffn_up.scale"]).item() == scale.item()
    assert report.largest_scale_error == 0


def test_a_merged_correction_is_the_sum(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(change=lambda model: convert_bitlinear_to_lrc(model, rank=3))
    stored = load_file(checkpoint / "model.safetensors")
    path = "model.layers.0.mlp.down_proj"
    codes, scale = quantize_weight(stored[f"{path}.weight"])
    expected = codes * scale + stored[f"{path}.lrc_U"] @ stored[f"{path}.lrc_V"].T

    export_gguf(checkpoint, tmp_path / "model.gguf", body="f16", merge_lrc=True)

    found = values(read(tmp_path / "model.gguf")[1]["blk.0.ffn_down.weight"])
    torch.testing.assert_close(found, expected, rtol=2**-10, atol=1e-6)  # fp16


@pytest.mark.parametrize(
    ("change", "flag", "named"),
    [
        (lambda model: set_quant_amount(model, 0.5), "at_full_quantisation", "--at-full-quantisation"),
        (lambda model: set_subln_amount(model, 0.25), "at_full_quantisation", "subln_amount 0.25"),
        (
            lambda model: set_sparsity(model, Sparsity(ratio=0.5)),
            "dense_activations",
            "--dense-activations",
        ),
    ],
)
def test_what_engines_do_not_compute_needs_its_flag(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, change: Any, flag: str, named: str
) -> None:
    checkpoint = make_checkpoint(change=change, convert={"subln": "output"})

    with pytest.raises(UserError) as refused:
        export_gguf(checkpoint, tmp_path / "model.gguf", body="f16")
    allowed: dict[str, Any] = {flag: True}
    export_gguf(checkpoint, tmp_path / "model.gguf", body="f16", **allowed)

    assert refused.value.exit_code == 2
    assert named in str(refused.value)


@pytest.mark.parametrize(
    ("family", "convert", "config", "named"),
    [
        ("qwen3", {"subln": "output"}, {}, "auto_convert.subln=none"),
        ("llama", {"subln": "all"}, {}, "auto_convert.subln=output"),
        ("llama", {"subln": "output"}, {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("llama", {"subln": "output"}, {"head_dim": 32}, "heads of 128 channels together, hidden_size 64"),
        ("llama", {"hidden_act": "relu2"}, {}, "hidden_act relu2"),
        ("llama", {"subln": "output"}, {"hidden_act": "gelu"}, "hidden_act gelu"),
        ("qwen2", {"subln": "output"}, {"tie_word_embeddings": True}, "biases on attn_k, attn_q, attn_v"),
        ("gemma3_text", {}, {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar 16"),
        ("gemma3_text", {}, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("llama", {}, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "yarn"),
    ],
)
def test_what_no_engine_holds_is_refused_with_the_setting(
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    family: str,
    convert: dict[str, str],
    config: dict[str, Any],
    named: str,
) -> None:
    checkpoint = make_checkpoint(family, convert=convert, **config)

    with pytest.raises(UserError, match="export gguf: ") as refused:
        export_gguf(checkpoint, tmp_path / "model.gguf")

    assert refused.value.exit_code == 2
    assert named in str(refused.value)
    assert not (tmp_path / "model.gguf").exists()


def test_nan_is_named_and_nothing_is_left(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in checkpoint.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = torch.nan
    save_file(tensors, damaged / "model.safetensors")
    republish(damaged)

    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        export_gguf(damaged, tmp_path / "out" / "model.gguf", body="f16")

    assert list((tmp_path / "out").iterdir()) == []


def republish(directory: Path) -> None:
    """A manifest that fits whatever is there, as somebody with bad intentions would write it."""
    (directory / "manifest.json").unlink()
    copy = directory.with_name("copy")
    with publish(copy) as temporary:
        shutil.copytree(directory, temporary, dirs_exist_ok=True)
    shutil.rmtree(directory)
    copy.rename(directory)
