"""A decoder that also fills in [MASK]: which token that is, and how many tokens a block has.

Kept on the model as a plain attribute and in `bitnet.json`. A token that the vocabulary has may be named, or
a row is added behind it. Its embedding starts as the mean of the others: a random one is far larger or
smaller than they are in some channels, which the int8 rounding of activations pays for (Fast-dLLM v2).
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from bitnet_arch.walk import config_of, walk
from durable import UserError

ATTRIBUTE = "block_diffusion"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDiffusion:
    """What block diffusion was trained with; generation needs the same."""

    mask_token_id: int
    block_size: int

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise UserError("block size of diffusion: too small", str(self.block_size), "give 2 or more")


def block_diffusion_of(model: nn.Module) -> BlockDiffusion | None:
    """None for a model that only knows next tokens."""
    found: BlockDiffusion | None = getattr(model, ATTRIBUTE, None)
    return found


def set_block_diffusion(model: nn.Module, diffusion: BlockDiffusion | None) -> None:
    """Note it on the model, from where `save_bitnet` takes it."""
    if diffusion is not None:
        check_mask_token(model, diffusion.mask_token_id)
    setattr(model, ATTRIBUTE, diffusion)


def check_mask_token(model: nn.Module, mask_token_id: int) -> None:
    """UserError for an id that the embedding has no row for."""
    num_rows = walk(model).vocab_size
    if not 0 <= mask_token_id < num_rows:
        raise UserError(
            "[MASK] is outside the vocabulary",
            f"id {mask_token_id}, the model has {num_rows} tokens",
            f"give an id below {num_rows}, or none to add a row for it",
        )


@torch.no_grad()
def add_mask_token(model: PreTrainedModel) -> int:
    """Add a row for [MASK] behind the vocabulary, in a head of its own, too; gives the token's id.

    The row in the head stays zero: nobody is to predict [MASK].
    """
    walked = walk(model)
    mask_token_id = walked.vocab_size
    has_bias = getattr(model.get_submodule(walked.head), "bias", None) is not None
    model.resize_token_embeddings(mask_token_id + 1, mean_resizing=False)
    config_of(model).vocab_size = mask_token_id + 1
    if not walked.is_tied:
        head = model.get_submodule(walked.head)
        assert isinstance(head, nn.Linear)
        head.weight[mask_token_id] = 0
        if has_bias:
            head.bias[mask_token_id] = 0
    start_mask_at_mean(model, mask_token_id)
    return mask_token_id


@torch.no_grad()
def start_mask_at_mean(model: nn.Module, mask_token_id: int) -> None:
    """Set the embedding of [MASK] to the mean of all others."""
    check_mask_token(model, mask_token_id)
    embedding = model.get_submodule(walk(model).embedding)
    assert isinstance(embedding, nn.Embedding)
    weight = embedding.weight
    others = weight.double().sum(0) - weight[mask_token_id].double()
    weight[mask_token_id] = (others / (len(weight) - 1)).to(weight.dtype)
