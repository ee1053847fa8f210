"""Checkpoints with tokenizers for tests, as a run leaves them: tiny, random, quickly made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from bitnet_arch import BlockDiffusion, ConversionConfig, convert_to_bitnet, save_bitnet, set_block_diffusion
from bitnet_arch.testing import TINY_MODELS

VOCAB_SIZE = 300
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
TEXT = ("the quick brown fox jumps over the lazy dog", "to be or not to be, that is the question")


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
