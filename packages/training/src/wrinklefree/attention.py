"""What we put around the attention functions of transformers, which takes others by name.

`observed` looks at what goes in; the output stays as it is, to the bit. `by_parts` runs SDPA over clean
tokens and each masked view of them (`objectives.views`) one after the other: queries of a view meet the keys
of the clean part and its own, a third to a half of all pairs, and no other view's.

Shapes: B samples, H heads, T tokens of a part, P parts, D head size.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from durable import UserError

SUFFIX, BY_PARTS = "_observed", "_by_parts"
OBSERVABLE = ("sdpa", "flex_attention")


@dataclass(frozen=True, slots=True)
class AttentionInput:
    """Of one layer: after the rotation, and after the norms of queries and keys where a family has them."""

    query: Tensor
    """[B, H, T, D]."""
    key: Tensor
    """[B, KV heads, S, D]."""
    value: Tensor
    mask: Any
    scale: float
    is_causal: bool


class Observer(Protocol):
    """Who is told."""

    def __call__(self, seen: AttentionInput, /) -> None: ...


@contextmanager
def observed(config: Any, observers: Mapping[nn.Module, Observer], *, wanted_by: str) -> Iterator[None]:
    """Tell the observers during the forward passes inside. `wanted_by` is the key that asks for it."""
    usual = str(config._attn_implementation)
    if not usual.removesuffix(SUFFIX).endswith(OBSERVABLE):
        raise UserError(
            f"{wanted_by}: reads what goes into {' or '.join(OBSERVABLE)}",
            f"attention {usual!r}",
            "load the model with attn_implementation='sdpa'",
        )
    config._attn_implementation = usual.removesuffix(SUFFIX) + SUFFIX
    before = {module: getattr(module, "attention_observers", ()) for module in observers}
    for module, observer in observers.items():
        module.attention_observers = (*before[module], observer)  # type: ignore[assignment]
    try:
        yield
    finally:
        config._attn_implementation = usual
        for module, earlier in before.items():
            if earlier:
                module.attention_observers = earlier
            else:
                del module.attention_observers


def _observing(name: str) -> Any:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> Any:
        scale, is_causal = options.get("scaling"), options.get("is_causal")
        _tell(module, query, key, value, attention_mask, scale, is_causal)
        return ALL_ATTENTION_FUNCTIONS[name](module, query, key, value, attention_mask, **options)

    return attention


def _tell_observers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scale: float | None,
    is_causal: bool | None,
) -> None:
    observers: tuple[Observer, ...] = getattr(module, "attention_observers", ())
    if not observers:
        return
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = mask is None and bool(is_causal)
    seen = AttentionInput(query, key, value, mask, scale or query.shape[-1] ** -0.5, causal)
    for observer in observers:
        observer(seen)


# Else a compiled block is compiled again for the observers of every step.
_tell = torch.compiler.disable(_tell_observers)


@contextmanager
def by_parts(config: Any) -> Iterator[None]:
    """Take the compact mask of `objectives.views.compact_view_mask` in the forward passes inside."""
    usual = str(config._attn_implementation)
    config._attn_implementation = usual + BY_PARTS
    try:
        yield
    finally:
        config._attn_implementation = usual


def _in_parts(name: str) -> Any:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> Any:
        whole = ALL_ATTENTION_FUNCTIONS[name]
        length = attention_mask.shape[-1] // 2
        is_plain = attention_mask.shape[-2] == length
        clean_mask = None if is_plain else attention_mask[..., :length, :length]
        view_mask = attention_mask[..., -length:, :]
        queries, keys, values = (each.split(length, dim=2) for each in (query, key, value))
        outputs = [whole(module, queries[0], keys[0], values[0], clean_mask, **options)[0]]
        for view in range(1, len(queries)):
            seen = [torch.cat([each[0], each[view]], dim=2) for each in (keys, values)]
            outputs.append(whole(module, queries[view], *seen, view_mask, **options)[0])
        return torch.cat(outputs, dim=1), None

    return attention


for _name in OBSERVABLE:
    ALL_ATTENTION_FUNCTIONS.register(_name + SUFFIX, _observing(_name))
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name + SUFFIX, ALL_MASK_ATTENTION_FUNCTIONS[_name])
for _name in ("sdpa", "sdpa" + SUFFIX):
    ALL_ATTENTION_FUNCTIONS.register(_name + BY_PARTS, _in_parts(_name))
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name + BY_PARTS, ALL_MASK_ATTENTION_FUNCTIONS[_name])
