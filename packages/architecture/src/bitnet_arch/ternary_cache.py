"""Quantised values that eager training can reuse, and how it knows when not to.

A weight is quantised once per optimizer step and reused by micro-batches, evaluation and recomputation.
`Tensor._version` alone does not tell when it is stale: `AdamW(fused=True)` writes weights without raising it.
So a counter of optimizer steps, fed by torch's own hook, is part of the key. A compiled graph and a functorch
transform quantise anew; there the compiler fuses, and wrapped tensors have no identity to key on.
"""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from bitnet_arch.quant import TernaryWeight, quantize_activations, quantize_weight

_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


def in_transform() -> bool:
    """Inside torch.func's grad, vmap and the like."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class WeightCache:
    """The last quantised value of one weight. A copy of a module starts with an empty one."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Quantise anew at the next use."""
        self._key: tuple[Any, ...] | None = None
        self._value: TernaryWeight | None = None

    def get(self, weight: Tensor) -> TernaryWeight:
        """`quantize_weight(weight)`, computed once per optimizer step."""
        # Anything but a plain parameter (a wrapped, fake or functional tensor) can change behind its
        # identity.
        if (
            torch.compiler.is_compiling()
            or type(weight) is not nn.Parameter
            or weight.is_inference()
            or in_transform()
        ):
            return quantize_weight(weight)
        key = (id(weight), weight._version, weight.data_ptr(), weight.dtype, _optimizer_steps)
        if self._value is None or key != self._key:
            self._key, self._value = key, quantize_weight(weight)
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeightCache":
        return WeightCache()

    def __reduce__(self) -> tuple[type["WeightCache"], tuple[()]]:
        return WeightCache, ()


class _LastActivations(threading.local):
    """What was quantised last on this thread."""

    source: "weakref.ref[Tensor] | None" = None
    version = 0
    value: tuple[Tensor, Tensor] | None = None


_last = _LastActivations()


def shared_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_activations(x)`; q, k and v (gate and up) are fed the same tensor one after the other and
    share the result.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.is_inference() or in_transform():
        return quantize_activations(x)
    if _last.value is None or _last.source is None or _last.source() is not x or _last.version != x._version:
        _last.value = quantize_activations(x)
        _last.source, _last.version = weakref.ref(x, _release), x._version
    return _last.value


def _release(source: "weakref.ref[Tensor]") -> None:
    """Give the memory back when the input itself is gone."""
    if _last.source is source:
        _last.source = _last.value = None
