"""A model that transformers read from a GGUF file is a pretrained model like any other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bitnet_arch.bitlinear import set_quant_amount
from bitnet_arch.checkpoint import load_bitnet, save_bitnet
from bitnet_arch.convert import convert_to_bitnet
from bitnet_arch.testing import tiny_llama

gguf = pytest.importorskip("gguf")
IDS = torch.arange(4, 20)[None]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(model: Any, path: Path) -> None:
    """A llama file as llama.cpp's converter writes it: q and k rows interleaved for its rotary embedding."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for index, layer in enumerate(model.model.layers):
        for name, short in NAMES.items():
            weight = layer.get_submodule(name).weight.detach()
            stored = interleaved(weight, heads[short]) if short in heads else weight
            writer.add_tensor(f"blk.{index}.{short}.weight", stored.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: Tensor, num_heads: int) -> Tensor:
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def test_a_model_from_gguf_is_converted_saved_and_loaded(tmp_path: Path) -> None:
    source = tiny_llama()
    write_gguf(source, tmp_path / "tiny.gguf")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(source))

    convert_to_bitnet(model)
    training = load_bitnet(save_bitnet(model, tmp_path / "training"))
    stock = load_bitnet(save_bitnet(model, tmp_path / "stock", layout="stock"))

    assert torch.equal(logits(training), logits(model))
    assert torch.equal(logits(stock), logits(model))
    assert "gguf" not in (tmp_path / "training" / "config.json").read_text()
    assert "gguf" not in (tmp_path / "stock" / "config.json").read_text()


def test_a_converted_model_is_no_longer_marked_as_quantised(tmp_path: Path) -> None:
    write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)

    convert_to_bitnet(model)

    model.save_pretrained(tmp_path / "plain")
    model.half()
    model.float()
    set_quant_amount(model, 0.0)
    assert isinstance(model.lm_head, nn.Linear)
    assert not hasattr(model.config, "quantization_config")
