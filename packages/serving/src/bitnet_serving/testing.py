"""A tiny GGUF file that llama.cpp loads: a random Llama in F16, with a tokenizer trained on a sentence."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from bitnet_serving.gguf_values import MetaValue
from bitnet_serving.gguf_writer import TensorToWrite, write_gguf

SENTENCE = "the quick brown fox jumps over the lazy dog"
# Printable ASCII, space and newline: whatever the model writes is whole characters.
ALPHABET = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
SPECIAL = ["<s>", "</s>"]
VOCABULARY, HIDDEN, FEED_FORWARD, LAYERS, HEADS, KV_HEADS = 128, 64, 96, 2, 4, 2
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def write_tiny_gguf(path: Path, *, context: int = 256, template: bool = True) -> Path:
    """The file, equal for equal arguments."""
    tokens, merges = _bpe()
    head = HIDDEN // HEADS
    metadata: dict[str, MetaValue] = {
        "general.architecture": "llama",
        "general.file_type": 1,
        "llama.context_length": context,
        "llama.embedding_length": HIDDEN,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": FEED_FORWARD,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": head,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }
    if template:
        metadata["tokenizer.chat_template"] = TEMPLATE
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (len(tokens), HIDDEN),
        "output_norm": (HIDDEN,),
        "output": (len(tokens), HIDDEN),
    }
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in _block(head).items()}
    random = torch.Generator().manual_seed(0)
    write_gguf(path, metadata, [_tensor(name, shape, random) for name, shape in shapes.items()])
    return path


def _block(head: int) -> dict[str, tuple[int, ...]]:
    return {
        "attn_norm": (HIDDEN,),
        "attn_q": (HEADS * head, HIDDEN),
        "attn_k": (KV_HEADS * head, HIDDEN),
        "attn_v": (KV_HEADS * head, HIDDEN),
        "attn_output": (HIDDEN, HEADS * head),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (FEED_FORWARD, HIDDEN),
        "ffn_up": (FEED_FORWARD, HIDDEN),
        "ffn_down": (HIDDEN, FEED_FORWARD),
    }


def _tensor(name: str, shape: tuple[int, ...], random: torch.Generator) -> TensorToWrite:
    if len(shape) == 1:
        values = torch.ones(shape)
    else:
        values = (torch.randn(shape, generator=random) * 0.6 / shape[-1] ** 0.5).half()
    return TensorToWrite(
        name=f"{name}.weight",
        format="f32" if len(shape) == 1 else "f16",
        shape=shape,
        produce=lambda: values.view(torch.uint8).reshape(-1),
    )


def _bpe() -> tuple[list[str], list[str]]:
    """Tokens by id, and merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, show_progress=False, initial_alphabet=ALPHABET, special_tokens=SPECIAL
    )
    tokenizer.train_from_iterator([SENTENCE] * 3, trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [" ".join(merge) for merge in model["merges"]]
