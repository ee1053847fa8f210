"""Looks at what goes into a decoder's attention, whose output stays as it is, to the bit.

transformers lets a program register attention functions by name. Ours are its own with observers beside
them: whatever is in `attention_observers` of the attention module is told of queries, keys and values.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from durable import UserError

SUFFIX = "_observed"
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
        observers = getattr(module, "attention_observers", ())
        if observers:
            is_causal = options.get("is_causal")
            is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            scale = options.get("scaling") or query.shape[-1] ** -0.5
            causal = attention_mask is None and bool(is_causal)
            for observer in observers:
                observer(AttentionInput(query, key, value, attention_mask, scale, causal))
        return ALL_ATTENTION_FUNCTIONS[name](module, query, key, value, attention_mask, **options)

    return attention


for _name in OBSERVABLE:
    ALL_ATTENTION_FUNCTIONS.register(_name + SUFFIX, _observing(_name))
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name + SUFFIX, ALL_MASK_ATTENTION_FUNCTIONS[_name])
