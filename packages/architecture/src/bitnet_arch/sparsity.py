"""Activation sparsity: only a token's largest activations reach the weights (Q-Sparse, arXiv 2407.10969).

Top-k keeps the k largest |x| of every token. The block form keeps n of every m neighbours (N:M), which
hardware can skip. The backward pass is straight-through to every element, kept or not, so that what is
dropped today can come back tomorrow.

The layer sparsifies first and quantises second. The largest |x| of a token always stays, hence the token's
scale too, and the integers are those of the paper's order, which masks the quantised token.

Shapes: x [..., K]; masks have the shape of x.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from durable import UserError


@dataclass(frozen=True, slots=True)
class Sparsity:
    """How much of every token is dropped, and in which pattern."""

    ratio: float
    """Share of activations that become zero, at least this much, unless one alone is left. 0 is off."""
    block: int | None = None
    """None chooses among the whole token; a width M chooses among every M neighbours."""

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)
        if self.block is not None and self.block < 2:
            raise UserError(
                "sparsity.block: a block needs a choice",
                self.block,
                "take 2 or more, or None for top-k",
            )


def sparsify(x: Tensor, sparsity: Sparsity | None) -> Tensor:
    """Drop what `sparsity` says; without one, or at ratio 0, the same tensor comes back."""
    if sparsity is None or sparsity.ratio == 0:
        return x
    if sparsity.block is None:
        return topk_sparsify(x, sparsity.ratio)
    return _keep_in_blocks(x, count_kept(sparsity.ratio, sparsity.block), sparsity.block)


def topk_sparsify(x: Tensor, ratio: float) -> Tensor:
    """Keep the largest (1 - ratio)·K magnitudes of every token, zero the rest."""
    _check_ratio(ratio)
    return x if ratio == 0 else _zero_the_rest(x, largest(x.detach().abs(), count_kept(ratio, x.shape[-1])))


def block_sparsify(x: Tensor, *, keep: int, block: int) -> Tensor:
    """Keep the `keep` largest magnitudes of every `block` neighbours; the last block may be shorter."""
    if not 1 <= keep <= block:
        raise UserError(f"sparsity: cannot keep that many of a block of {block}", keep, f"keep 1 to {block}")
    return x if keep == block else _keep_in_blocks(x, torch.tensor(keep, device="cpu"), block)


def _keep_in_blocks(x: Tensor, keep: Tensor, block: int) -> Tensor:
    width = x.shape[-1]
    # Padding is smaller than any magnitude, so it never takes a place from a real activation.
    magnitude = nn.functional.pad(x.detach().abs(), (0, -width % block), value=-1.0)
    mask = largest(magnitude.reshape(*x.shape[:-1], -1, block), keep).flatten(-2)[..., :width]
    return _zero_the_rest(x, mask)


def count_kept(ratio: float, width: int) -> Tensor:
    """How many of `width` stay: (1 - ratio)·width rounded down, and at least one.

    In floats (1 - 0.9)·10 is 0.9999999999999998; the small term keeps such a product from losing one.
    The count is a tensor, because a compiled graph would be built anew for every Python integer of a ramp.
    """
    share = (1 - ratio) * torch.ones((), dtype=torch.float64, device="cpu")
    return (share * width + 1e-6).floor().clamp(min=1).to(torch.int64)


def largest(magnitude: Tensor, keep: Tensor) -> Tensor:
    """Boolean mask of exactly `keep` largest entries in the last dimension; among equals the first win.

    NaN stays in addition: whoever guards a training step must be able to see it.
    """
    threshold: Tensor = kth_largest(magnitude, keep)
    above, tied = magnitude > threshold, magnitude == threshold
    free_places = keep.to(magnitude.device) - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1, dtype=torch.int32) <= free_places)) | magnitude.isnan()


@torch.library.custom_op("bitnet_arch::kth_largest", mutates_args=())
def kth_largest(magnitude: Tensor, keep: Tensor) -> Tensor:
    """The `keep`-th largest entry of every row. `keep` lies on the CPU, so reading it waits for no device."""
    return magnitude.topk(int(keep), dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)


@kth_largest.register_fake
def _(magnitude: Tensor, keep: Tensor) -> Tensor:
    return magnitude.new_empty(*magnitude.shape[:-1], 1)


@kth_largest.register_vmap
def _(
    info: object, in_dims: tuple[int | None, int | None], magnitude: Tensor, keep: Tensor
) -> tuple[Tensor, int]:
    assert in_dims[0] is not None
    assert in_dims[1] is None, "every example keeps the same number"
    threshold: Tensor = kth_largest(magnitude.movedim(in_dims[0], 0), keep)
    return threshold, 0


def _zero_the_rest(x: Tensor, mask: Tensor) -> Tensor:
    """The value is x where kept and 0 elsewhere, the gradient is that of x everywhere."""
    return x - x.detach().masked_fill(mask, 0)


def _check_ratio(ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise UserError("sparsity.ratio: not a share of the activations", ratio, "at least 0 and below 1")
