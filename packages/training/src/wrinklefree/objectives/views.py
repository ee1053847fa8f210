"""Masked copies of a batch for block diffusion, and who looks at whom when they run beside the clean one.

    tokens     [ clean x_0 | masked x_t | its complement x̄_t ]       (Fast-dLLM v2, arXiv 2509.26328)
    positions  the same in each part
    attention  x_0 → x_0: causal, within the document
               x_t → x_0: blocks of the document strictly before its own
               x_t → x_t: its own block, in both directions;  nothing looks at another masked part

So logits of the clean part are those of a plain causal forward. Blocks count from the document's start. The
first token of a block is never masked: generation takes it from the clean prefix. Of the other tokens with a
label each is masked in x_t with the block's probability, and in x̄_t where it is not in x_t.

What is masked is a function of seed, sample and place alone, so neither resuming nor the cut of a step into
micro-batches changes it.

Shapes: B samples, T tokens, P parts; queries are rows, keys are columns.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_handler import Batch
from data_handler.masks import added_mask, by_layer_type, document_mask
from data_handler.types import IGNORED_LABEL

SMALLEST_PROBABILITY = 1e-3
"""Of a mask, where losses are divided by it (LLaDA's ε)."""


@dataclass(frozen=True, slots=True)
class MaskedViews:
    """Which tokens are masked."""

    masked: tuple[Tensor, ...]
    """Of each view, [B, T] boolean."""
    probability: tuple[Tensor, ...]
    """Of each view, [B, T]: with which a token that may be masked was."""

    def __len__(self) -> int:
        return len(self.masked)

    def tokens(self, input_ids: Tensor, mask_token_id: int) -> Tensor:
        """[B, P · T]: the clean tokens, then each view's."""
        return torch.cat(
            [input_ids, *(input_ids.masked_fill(masked, mask_token_id) for masked in self.masked)], dim=1
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewPlan:
    """How a run draws its views."""

    block_size: int
    complementary: bool = True
    """Two views, which together mask every token once; else one."""
    mask_prob: float | None = None
    """Of the first view; none draws it for every block, evenly between 0 and 1."""
    causal: bool = False
    """Views run alone under a causal mask, for attention that takes no other. That is not block diffusion."""
    seed: int = 0

    @property
    def num_views(self) -> int:
        return 2 if self.complementary else 1

    def maskable(self, batch: Batch) -> Tensor:
        """[B, T] boolean: tokens with a label, but for the first of each block."""
        return (batch.labels != IGNORED_LABEL) & (batch.position_ids % self.block_size != 0)

    def draw(self, batch: Batch) -> MaskedViews:
        """The views of a batch."""
        place_BT = places(batch.position_ids)
        sample_BT = batch.sample_id[:, None].expand_as(place_BT)
        if self.mask_prob is None:
            block_BT = block_ids(batch.position_ids, self.block_size)
            share_BT = uniform(self.seed, 1, sample_BT, block_BT)
            smallest = SMALLEST_PROBABILITY
            probability_BT = smallest + (1 - 2 * smallest) * share_BT
        else:
            probability_BT = torch.full_like(place_BT, self.mask_prob, dtype=torch.float64)
        maskable_BT = self.maskable(batch)
        chosen_BT = uniform(self.seed, 0, sample_BT, place_BT) < probability_BT
        if not self.complementary:
            return MaskedViews((maskable_BT & chosen_BT,), (probability_BT,))
        return MaskedViews(
            (maskable_BT & chosen_BT, maskable_BT & ~chosen_BT), (probability_BT, 1 - probability_BT)
        )


def block_ids(position_ids: Tensor, block_size: int) -> Tensor:
    """[B, T]: where in the sample a token's block begins; ascends, and no document shares one."""
    return places(position_ids) - position_ids % block_size


def places(tokens: Tensor) -> Tensor:
    """[B, T]: 0, 1, 2 … in each row. Made from a tensor, so that it is real where that is (`LiveTensors`)."""
    return torch.ones_like(tokens).cumsum(1) - 1


def uniform(seed: int, stream: int, sample: Tensor, place: Tensor) -> Tensor:
    """Evenly in [0, 1), float64, the same on every device: splitmix64 over what it is asked about."""
    state = _mixed(torch.zeros_like(sample) + _signed(seed * 2 + stream))
    return _shifted(_mixed(_mixed(state ^ sample) ^ place), 11).double() * 2.0**-53


def _mixed(state: Tensor) -> Tensor:
    state = state + _signed(0x9E3779B97F4A7C15)
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """To the right as if it had no sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def view_mask(
    document_ids: Tensor,
    position_ids: Tensor,
    *,
    block_size: int,
    num_views: int,
    sliding_window: int | None = None,
) -> Tensor:
    """[B, 1, P · T, P · T] boolean: True where a query may look at a key."""
    length = document_ids.shape[1]
    clean, to_clean, to_own = _quarters(document_ids, position_ids, block_size, sliding_window)
    parts = 1 + num_views
    whole = clean.new_zeros(len(clean), 1, parts * length, parts * length)
    whole[..., :length, :length] = clean
    for start in range(length, parts * length, length):
        end = start + length
        whole[..., start:end, :length] = to_clean
        whole[..., start:end, start:end] = to_own
    return whole


def _quarters(
    document_ids: Tensor, position_ids: Tensor, block_size: int, sliding_window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, 1, T, T] each: clean to clean, view to clean, view to itself."""
    block_BT = block_ids(position_ids, block_size)
    block_BQ, block_BK = block_BT[:, None, :, None], block_BT[:, None, None, :]
    clean = document_mask(document_ids, sliding_window=sliding_window)
    # Blocks ascend with their places, so an earlier block is in the past; the causal mask knows the document.
    to_clean = clean & (block_BK < block_BQ)
    to_own = block_BK == block_BQ
    if sliding_window is not None:
        to_own &= document_mask(document_ids, causal=False, sliding_window=sliding_window)
    return clean, to_clean, to_own


def compact_view_mask(
    document_ids: Tensor, position_ids: Tensor, *, block_size: int, sliding_window: int | None = None
) -> Tensor:
    """For `attention.by_parts`: [B, 1, T, 2 · T], whom any view looks at in the clean part and in itself.

    Above it stand T rows of the clean part, where that is not merely causal.
    """
    clean, *of_view = _quarters(document_ids, position_ids, block_size, sliding_window)
    view = torch.cat(of_view, dim=-1)
    is_one_document = bool((document_ids == document_ids[:, :1]).all())
    if is_one_document and (sliding_window is None or sliding_window >= document_ids.shape[1]):
        return view
    return torch.cat([torch.cat([clean, torch.zeros_like(clean)], dim=-1), view], dim=-2)


def view_attention_mask(
    config: Any, batch: Batch, *, block_size: int, num_views: int, dtype: torch.dtype
) -> Any:
    """As a transformers model with this `config` takes it, SDPA by parts; a dict where layers differ."""
    implementation = str(getattr(config, "_attn_implementation", None))

    def mask(window: int | None) -> Any:
        if implementation.startswith("flex"):
            return flex_view_mask(batch, block_size=block_size, num_views=num_views, sliding_window=window)
        documents, positions = batch.document_ids, batch.position_ids
        if implementation.startswith("sdpa"):
            return compact_view_mask(documents, positions, block_size=block_size, sliding_window=window)
        allowed = view_mask(
            documents, positions, block_size=block_size, num_views=num_views, sliding_window=window
        )
        return added_mask(allowed, dtype)

    return by_layer_type(config, mask)


def flex_view_mask(
    batch: Batch, *, block_size: int, num_views: int, sliding_window: int | None = None
) -> Any:
    """The same as `view_mask`, as a `BlockMask` of FlexAttention, which skips what nobody sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    num_samples, length = batch.input_ids.shape
    document, block = batch.document_ids, block_ids(batch.position_ids, block_size)

    def allowed(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_part, key_part = query // length, key // length
        row, column = query % length, key % length
        own_block = block[sample, row] == block[sample, column]
        earlier = block[sample, column] < block[sample, row]
        clean = (document[sample, row] == document[sample, column]) & (row >= column)
        seen = torch.where(
            key_part == 0,
            clean & ((query_part == 0) | earlier),
            (query_part == key_part) & own_block,
        )
        return seen & ((row - column).abs() < sliding_window) if sliding_window is not None else seen

    total = (1 + num_views) * length
    return create_block_mask(allowed, num_samples, None, total, total, device=str(document.device))
