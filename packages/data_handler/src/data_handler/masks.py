"""Attention that stays inside documents: what a packed batch needs to mean the same as its documents alone.

transformers guesses packing from position ids only when there is no cache; an explicit mask always holds.
`attention_mask` is what `model(input_ids, position_ids=…, attention_mask=…)` takes with SDPA and with eager
attention: one mask, or one for each kind of layer when some see a sliding window only. `flex_mask` is the
same for FlexAttention, which skips the blocks that nobody sees.

Shapes: B samples, T tokens; queries are rows, keys are columns.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Mask = TypeVar("Mask")


def document_mask(document_ids: Tensor, *, causal: bool = True, sliding_window: int | None = None) -> Tensor:
    """[B, T] → [B, 1, T, T] boolean: True where a query may look at a key.

    With a window, a token sees itself and the `sliding_window - 1` before it (and after it, unless causal).
    """
    length = document_ids.shape[-1]
    place = torch.arange(length, device=document_ids.device)
    distance_TT = place[:, None] - place[None, :]
    allowed = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    if causal:
        allowed = allowed & (distance_TT >= 0)
    if sliding_window is not None:
        allowed = allowed & (distance_TT.abs() < sliding_window)
    return allowed


def attention_mask(
    config: Any, document_ids: Tensor, *, causal: bool = True, dtype: torch.dtype = torch.float32
) -> Tensor | dict[str, Tensor]:
    """The mask for a transformers model with this `config`; a dict by layer type where it has several.

    Boolean, and for eager attention the numbers of type `dtype` that it adds to its scores.
    """
    is_added = getattr(config, "_attn_implementation", None) == "eager"

    def mask(window: int | None) -> Tensor:
        allowed = document_mask(document_ids, causal=causal, sliding_window=window)
        return added_mask(allowed, dtype) if is_added else allowed

    return by_layer_type(config, mask)


def by_layer_type(config: Any, mask: Callable[[int | None], Mask]) -> Mask | dict[str, Mask]:
    """What `mask` makes of a sliding window; a dict by layer type where layers of a model differ."""
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    window = getattr(config, "sliding_window", None)
    if not kinds:
        return mask(window)
    windows = {"full_attention": None, "sliding_attention": window}
    foreign = [kind for kind in kinds if kind not in windows]
    if foreign:
        raise ValueError(
            f"Cannot mask documents in layers of type {foreign[0]!r}; {' and '.join(windows)} are known."
        )
    return {kind: mask(windows[kind]) for kind in kinds}


def added_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """What eager attention adds. A boolean mask would be added as 0 and 1: it hides nothing."""
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill_(~allowed, torch.finfo(dtype).min)


def flex_mask(document_ids: Tensor, *, causal: bool = True, sliding_window: int | None = None) -> Any:
    """The same as `document_mask`, as a `BlockMask` of `torch.nn.attention.flex_attention`."""
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = document_ids[sample, query] == document_ids[sample, key]
        if causal:
            same = same & (query >= key)
        if sliding_window is not None:
            same = same & ((query - key).abs() < sliding_window)
        return same

    num_samples, length = document_ids.shape
    return create_block_mask(allowed, num_samples, None, length, length, device=str(document_ids.device))
