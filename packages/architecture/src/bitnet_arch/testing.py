"""Tiny decoders for tests: transformers' own classes, random, a fraction of a second to build, different
dimensions everywhere.

A freshly built model has norm gains of exactly one and biases of exactly zero, which hides a gain that went
to the wrong norm and a bias that was dropped. Here both are random. The same seed gives the same bits, and
the global random state stays as it was.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    BitNetConfig,
    BitNetForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

Model = TypeVar("Model", bound=PreTrainedModel)


def tiny_llama(*, vocab_size: int = 512, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """Two layers, grouped queries, tied head: the shape of SmolLM2."""
    dimensions = {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return _build(
        LlamaForCausalLM,
        LlamaConfig,
        seed,
        {
            "vocab_size": vocab_size,
            **dimensions,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "max_position_embeddings": 256,
        }
        | config,
    )


def tiny_mistral(*, vocab_size: int = 512, seed: int = 0, **config: Any) -> MistralForCausalLM:
    """Three layers with a sliding window, and a head of its own."""
    dimensions = {
        "hidden_size": 48,
        "intermediate_size": 104,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
    }
    return _build(
        MistralForCausalLM,
        MistralConfig,
        seed,
        {
            "vocab_size": vocab_size,
            **dimensions,
            "num_key_value_heads": 3,
            "head_dim": 8,
            "sliding_window": 5,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "max_position_embeddings": 256,
        }
        | config,
    )


def tiny_qwen2(*, vocab_size: int = 512, seed: int = 0, **config: Any) -> Qwen2ForCausalLM:
    """Biases on q, k and v."""
    dimensions = {
        "hidden_size": 56,
        "intermediate_size": 144,
        "num_hidden_layers": 2,
        "num_attention_heads": 7,
    }
    return _build(
        Qwen2ForCausalLM,
        Qwen2Config,
        seed,
        {
            "vocab_size": vocab_size,
            **dimensions,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "max_position_embeddings": 256,
        }
        | config,
    )


def tiny_qwen3(*, vocab_size: int = 512, seed: int = 0, **config: Any) -> Qwen3ForCausalLM:
    """Norms on queries and keys, and heads that are together wider than the hidden state."""
    dimensions = {
        "hidden_size": 40,
        "intermediate_size": 120,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return _build(
        Qwen3ForCausalLM,
        Qwen3Config,
        seed,
        {
            "vocab_size": vocab_size,
            **dimensions,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "max_position_embeddings": 256,
        }
        | config,
    )


def tiny_gemma3(*, vocab_size: int = 512, seed: int = 0, **config: Any) -> Gemma3ForCausalLM:
    """Four norms per layer that multiply by one plus their weight, a sliding and a full layer, a scaled and
    tied embedding.
    """
    dimensions = {
        "hidden_size": 72,
        "intermediate_size": 136,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
    }
    return _build(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        seed,
        {
            "vocab_size": vocab_size,
            **dimensions,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "max_position_embeddings": 256,
        }
        | config,
    )


def tiny_bitnet(*, vocab_size: int = 512, seed: int = 0, **config: Any) -> BitNetForCausalLM:
    """transformers' own BitNet: squared ReLU, and norms of its own in front of o_proj and down_proj."""
    dimensions = {
        "hidden_size": 80,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
    }
    return _build(
        BitNetForCausalLM,
        BitNetConfig,
        seed,
        {
            "vocab_size": vocab_size,
            **dimensions,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "max_position_embeddings": 256,
        }
        | config,
    )


TINY_MODELS = {
    "llama": tiny_llama,
    "mistral": tiny_mistral,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "gemma3_text": tiny_gemma3,
    "bitnet": tiny_bitnet,
}
"""By the family's name in `walk`."""


def assert_same_distribution(logits_a: Tensor, logits_b: Tensor, *, kl: float = 1e-5) -> None:
    """The next-token distributions differ by at most `kl` nats, KL(a ‖ b) averaged over positions."""
    assert logits_a.shape == logits_b.shape, f"{tuple(logits_a.shape)} against {tuple(logits_b.shape)}"
    assert logits_a.isfinite().all(), "the first logits are not finite"
    assert logits_b.isfinite().all(), "the second logits are not finite"
    log_a, log_b = torch.log_softmax(logits_a.double(), dim=-1), torch.log_softmax(logits_b.double(), dim=-1)
    measured = nn.functional.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1).mean().item()
    assert measured <= kl, f"KL is {measured:.3g} nats per position, more than {kl:.3g}"


def _build(
    model_class: type[Model], config_class: type[PreTrainedConfig], seed: int, config: dict[str, Any]
) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**config))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.train(False)
    return model
