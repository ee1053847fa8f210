"""What tests are made of, tiny and random: checkpoints as a run leaves them, a file for an engine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from bitnet_arch import BlockDiffusion, ConversionConfig, convert_to_bitnet, save_bitnet, set_block_diffusion
from bitnet_arch.testing import TINY_MODELS
from bitnet_serving.gguf_values import MetaValue
from bitnet_serving.gguf_writer import TensorToWrite, write_gguf

VOCAB_SIZE = 300
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
TEXT = ("the quick brown fox jumps over the lazy dog", "to be or not to be, that is the question")

SENTENCE = "the quick brown fox jumps over the lazy dog"
# Printable ASCII, space and newline: whatever the model writes is whole characters.
ALPHABET = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
SPECIAL = ["<s>", "</s>"]
VOCABULARY, HIDDEN, FEED_FORWARD, LAYERS, HEADS, KV_HEADS = 128, 64, 96, 2, 4, 2
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def byte_level_tokenizer(*, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """GPT-2's pipeline over a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [f"{line} " * 3 for line in TEXT],
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            special_tokens=["<|endoftext|>", "<|pad|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
    )


def save_tiny(
    directory: Path,
    family: str = "llama",
    *,
    convert: dict[str, Any] | None = None,
    change: Callable[[nn.Module], object] | None = None,
    mask: int | None = None,
    save: dict[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **config: Any,
) -> Path:
    """Convert a tiny model, `change` it, and save it with a tokenizer. `mask` is the token of [MASK]."""
    model = TINY_MODELS[family](**{"vocab_size": VOCAB_SIZE} | config)
    convert_to_bitnet(model, ConversionConfig(**convert or {}))
    if change is not None:
        change(model)
    if mask is not None:
        set_block_diffusion(model, BlockDiffusion(mask_token_id=mask, block_size=4))
    return save_bitnet(model, directory, tokenizer=tokenizer or byte_level_tokenizer(), **save or {})


def write_tiny_gguf(path: Path, *, context: int = 256, template: bool = True) -> Path:
    """A random Llama in F16 that llama.cpp loads, with a tokenizer of its own; equal for equal arguments."""
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
