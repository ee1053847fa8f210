"""From a prompt's tokens to those that a model writes after it."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitnet_arch import block_diffusion_of
from bitnet_arch.walk import config_of
from durable import UserError
from wrinklefree.decoding import Decoding
from wrinklefree.generation.autoregressive import autoregressive
from wrinklefree.generation.block_diffusion import Filling, block_diffusion
from wrinklefree.generation.choice import Choice
from wrinklefree.generation.prefix import Prefix
from wrinklefree.objectives.states import NEEDS_OTHER_MASKS


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What a model wrote, and in how many forwards."""

    tokens: list[int]
    """Without the prompt; the last one may be one that ends a text."""
    num_forwards: int
    """Those that read the prompt are among them."""

    @property
    def tokens_per_forward(self) -> float:
        """1 for token after token."""
        return len(self.tokens) / self.num_forwards


def generate_ids(
    model: PreTrainedModel,
    prompt: Sequence[int],
    decoding: Decoding | None = None,
    *,
    ends: Collection[int] | None = None,
) -> Generated:
    """The tokens that `model`, in evaluation mode, writes after those of a prompt.

    `ends` are tokens after which nothing follows: by default those of the model's `generation_config`, whose
    `suppress_tokens` are never produced. Its other fields are not read.
    """
    decoding = decoding or Decoding()
    prefix = Prefix(model, cached=decoding.prefix_cache)
    ends = ends_of(model) if ends is None else ends
    tokens = [token for new in stream_ids(prefix, prompt, decoding, ends=ends) for token in new]
    return Generated(tokens=tokens, num_forwards=prefix.num_forwards)


def stream_ids(
    prefix: Prefix,
    prompt: Sequence[int],
    decoding: Decoding,
    *,
    ends: Collection[int],
    generator: torch.Generator | None = None,
) -> Iterator[list[int]]:
    """The same as they are decoded, some at a time. What the prefix has of the prompt is not read again.

    Draws come from `generator`, by default a new one with the seed of `decoding`.
    """
    model = prefix.model
    num_new = check_request(model, prompt, decoding)
    diffusion = block_diffusion_of(model)
    choice = Choice(
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        generator=generator or torch.Generator().manual_seed(decoding.seed),
        never=_never_produced(model),
    )
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(prefix.tokens, prompt, strict=False))
    # The last token is read again, as nobody kept its logits.
    num_known = min(len(list(shared)), len(prompt) - 1)
    if decoding.mode == "ar":
        prefix.rewind(num_known)
        yield from autoregressive(prefix, prompt, num_new=num_new, choice=choice, ends=ends)
        return
    assert diffusion is not None
    prefix.rewind(num_known - num_known % diffusion.block_size)
    filling = Filling(
        diffusion=diffusion,
        sub_block=decoding.sub_block_of(diffusion.block_size),
        threshold=decoding.threshold,
        choice=choice,
        ends=set(ends) - {diffusion.mask_token_id},
    )
    yield from block_diffusion(prefix, prompt, filling, num_new=num_new, longest=longest_of(model))


def check_request(model: PreTrainedModel, prompt: Sequence[int], decoding: Decoding) -> int:
    """How many tokens may follow; UserError for what this model cannot do."""
    if not prompt:
        raise UserError("prompt: has no tokens", fix="give some text to go on from")
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    num_tokens = len(embedding)
    if max(prompt) >= num_tokens:
        raise UserError(
            "prompt: has a token that the model does not know",
            f"{max(prompt)}, the model has {num_tokens}",
            "use the tokenizer that it was trained with",
        )
    if decoding.mode == "diffusion":
        diffusion = block_diffusion_of(model)
        if diffusion is None:
            raise UserError(
                "mode: this model has no [MASK] to fill in",
                decoding.mode,
                "set --mode ar, or name a model that was trained with objectives.dlm",
            )
        decoding.sub_block_of(diffusion.block_size)
        attention = str(config_of(model)._attn_implementation)
        if attention.startswith(NEEDS_OTHER_MASKS):
            raise UserError("mode: diffusion needs attention that takes any mask", attention, "set sdpa")
    return decoding.num_new_tokens(len(prompt), longest_of(model))


def longest_of(model: PreTrainedModel) -> int | None:
    """How many positions a model has; None where it does not say."""
    longest: int | None = getattr(config_of(model), "max_position_embeddings", None)
    return longest


def ends_of(model: PreTrainedModel) -> set[int]:
    """What `model.generate` ends at."""
    given = getattr(model.generation_config, "eos_token_id", None)
    return {given} if isinstance(given, int) else set(given or ())


def _never_produced(model: PreTrainedModel) -> set[int]:
    """What the model's `generation_config` suppresses, and [MASK]."""
    diffusion = block_diffusion_of(model)
    suppressed = getattr(model.generation_config, "suppress_tokens", None) or ()
    return {*suppressed, *(() if diffusion is None else (diffusion.mask_token_id,))}
