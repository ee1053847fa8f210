"""Decoders that benchmarks build at random, in the shape of published ones."""

from typing import Any

SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
"""Of SmolLM2-135M, as `LlamaConfig` takes it."""
