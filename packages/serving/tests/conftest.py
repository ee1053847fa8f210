"""A tiny GGUF file that llama.cpp loads, written by its own Python package; its tokenizer is trained here."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

# Printable ASCII, space and newline: whatever the model writes is whole characters.
ALPHABET = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
SPECIAL = ["<s>", "</s>"]
CONTEXT = 256
HIDDEN, FEED_FORWARD, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def bpe() -> dict[str, Any]:
    """Vocabulary and merges of a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=128,
        show_progress=False,
        initial_alphabet=ALPHABET,
        special_tokens=SPECIAL,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


def write_tiny_gguf(path: Path, *, context: int = CONTEXT) -> Path:
    """A random Llama of two layers, in F16."""
    model, random = bpe(), np.random.default_rng(0)
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    head = HIDDEN // HEADS

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)

    def add(name: str, *shape: int) -> None:
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
        else:
            values = random.standard_normal(shape) * 0.6 / np.sqrt(shape[-1])
            writer.add_tensor(f"{name}.weight", values.astype(np.float16))

    add("token_embd", len(tokens), HIDDEN)
    add("output_norm", HIDDEN)
    add("output", len(tokens), HIDDEN)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        add(f"{block}.attn_norm", HIDDEN)
        add(f"{block}.attn_q", HEADS * head, HIDDEN)
        add(f"{block}.attn_k", KV_HEADS * head, HIDDEN)
        add(f"{block}.attn_v", KV_HEADS * head, HIDDEN)
        add(f"{block}.attn_output", HIDDEN, HEADS * head)
        add(f"{block}.ffn_norm", HIDDEN)
        add(f"{block}.ffn_gate", FEED_FORWARD, HIDDEN)
        add(f"{block}.ffn_up", FEED_FORWARD, HIDDEN)
        add(f"{block}.ffn_down", HIDDEN, FEED_FORWARD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def long_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with room for an answer that nobody waits for."""
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "long.gguf", context=65_536)
