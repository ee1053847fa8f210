"""y = (q @ codesᵀ)·(a/127)·s with integers, and the straight-through gradient (arXiv 2402.17764).

                 ┌─ round ─► q int8 ──┐
        x ───────┤                    ├─ integer GEMM ─► · a/127 · s ─► y
                 └─ max|x| ► a        │
        W ── round ► codes int8, s ───┘

Backward keeps int8 activations, row scales and (in eager mode) int8 codes, never a dequantised copy:
dx = dy @ (s·codes), dW = dyᵀ @ (a/127·q): the gradients of a plain linear layer that was given the quantised
values.

Shapes: x [..., K]; q [..., K]; absmax [..., 1]; codes [N, K]; y [..., N].
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from bitnet_arch import gemm
from bitnet_arch.quant import TernaryWeight, dequantize_activations, round_weight


class TernaryProduct(torch.autograd.Function):
    """Integers forward, straight through backward. `x` and `weight` enter only to receive their gradients."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        q: Tensor,
        absmax: Tensor,
        codes: Tensor,
        scale: Tensor,
        out_dtype: torch.dtype,
        backward_dtype: torch.dtype | None,
    ) -> Tensor:
        integers = gemm.integer_product(q.reshape(-1, q.shape[-1]), codes)
        row_scale = absmax.reshape(-1, 1) * scale / 127
        # Cast, then scale in place: torch multiplies tensors of two dtypes ten times slower.
        y = integers.float().mul_(row_scale)
        return y.to(out_dtype).reshape(*x.shape[:-1], codes.shape[0])

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, q, absmax, codes, scale, _, ctx.backward_dtype = inputs  # type: ignore[attr-defined]
        # A compiled backward rounds the weight again in the pass that scales it, and so keeps no codes.
        kept_weight = weight if torch.compiler.is_compiling() else codes
        ctx.save_for_backward(q, absmax, kept_weight, scale)
        ctx.dtypes = (x.dtype, weight.dtype)  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, absmax, kept_weight, scale = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        dtype = ctx.backward_dtype or gemm.backward_dtype(grad)
        rows = grad.reshape(-1, grad.shape[-1]).to(dtype)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            codes = round_weight(kept_weight, scale) if kept_weight.is_floating_point() else kept_weight
            grad_x = gemm.matmul(rows, TernaryWeight(codes, scale).value(dtype)).to(x_dtype).reshape(q.shape)
        if ctx.needs_input_grad[1]:
            value = dequantize_activations(q.reshape(-1, q.shape[-1]), absmax.reshape(-1, 1), dtype)
            grad_weight = gemm.matmul(rows.t(), value).to(weight_dtype)
        return grad_x, grad_weight, None, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        """A batch of inputs is one longer input; a batch of weights is a loop."""
        if all(dim is None for dim in (in_dims[1], in_dims[4], in_dims[5])):
            x, q, absmax = (_batch_first(inputs[i], in_dims[i], info.batch_size) for i in (0, 2, 3))
            return TernaryProduct.apply(x, inputs[1], q, absmax, *inputs[4:]), 0
        one_by_one = (
            [_select(value, dim, index) for value, dim in zip(inputs, in_dims, strict=True)]
            for index in range(info.batch_size)
        )
        products = [TernaryProduct.apply(*one) for one in one_by_one]
        return torch.stack(products), 0


class StraightThrough(torch.autograd.Function):
    """The value of the second argument, with the gradient of the first."""

    generate_vmap_rule = True

    @staticmethod
    def forward(source: Tensor, value: Tensor) -> Tensor:
        return value.to(source.dtype, copy=True)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(source: Tensor, value: Tensor) -> Tensor:
    """`value`, differentiated as if it were `source`."""
    result: Tensor = StraightThrough.apply(source, value)
    return result


def _batch_first(value: Tensor, dim: int | None, batch_size: int) -> Tensor:
    return value.expand(batch_size, *value.shape) if dim is None else value.movedim(dim, 0)


def _select(value: Any, dim: int | None, index: int) -> Any:
    return value if dim is None else value.select(dim, index)
