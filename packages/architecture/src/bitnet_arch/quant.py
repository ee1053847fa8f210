"""The quantisation contract that training, packing, export and verification share.

Weights, per tensor (BitNet b1.58, arXiv 2402.17764): s = max(mean|W|, 1e-5), codes = clip(round(W/s), -1, 1),
value s·codes. Activations, per token: a = max(max|x|, 1e-5), q = round(x·(127/a)), value a/127·q. Rounding is
half to even, statistics are fp32, and the weight is quantised as stored, before any autocast cast. Nothing
here has a gradient.

Shapes: weight [N, K]; codes [N, K]; x [..., K]; q [..., K]; absmax [..., 1].
"""

from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-5
"""Smallest scale of a weight tensor and of a token: all-zero inputs stay zero instead of NaN."""


class TernaryWeight(NamedTuple):
    """`scale * codes` is the weight that a ternary layer multiplies with."""

    codes: Tensor
    """int8 in {-1, 0, +1}, shaped like the weight."""
    scale: Tensor
    """0-d float32."""

    def value(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for: ±scale, rounded to `dtype`."""
        return self.codes.to(dtype).mul_(self.scale)


def abs_row_sums(weight: Tensor) -> Tensor:
    """fp32 sum of |W| over each row.

    A row is added up by one thread, so the number of threads does not matter.
    """
    return weight.float().abs().sum(dim=-1)


@torch.library.custom_op("bitnet_arch::abs_row_sums", mutates_args=())
def _opaque_abs_row_sums(weight: Tensor) -> Tensor:
    """`abs_row_sums` as the compiler may not rewrite it: a fused kernel adds in another order, and codes at a
    tie would flip.
    """
    return abs_row_sums(weight)


@_opaque_abs_row_sums.register_fake
def _(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[:-1], dtype=torch.float32)


def weight_scale(weight: Tensor) -> Tensor:
    """Mean absolute weight of the whole tensor: the float64 sum of fp32 row sums, rounded to fp32.

    A plain fp32 mean depends on how threads split it, and with it a code now and then.
    """
    weight = weight.detach()
    row_sums = _opaque_abs_row_sums(weight) if torch.compiler.is_compiling() else abs_row_sums(weight)
    return (row_sums.double().sum() / weight.numel()).float().clamp(min=EPS)


def round_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """The int8 codes of a weight whose scale is known."""
    # The division makes fresh memory, so the rest may work in place.
    return (weight.detach().float() / scale).round_().clamp_(-1, 1).to(torch.int8)


def quantize_weight(weight: Tensor) -> TernaryWeight:
    """Round a weight to {-1, 0, +1} and its scale."""
    scale = weight_scale(weight)
    return TernaryWeight(round_weight(weight, scale), scale)


def ternary(weight: Tensor) -> Tensor:
    """The value of the quantised weight, in the dtype of the weight."""
    return quantize_weight(weight).value(weight.dtype)


def token_absmax(x: Tensor) -> Tensor:
    """Largest magnitude of every token in fp32, at least EPS. NaN and Inf stay visible."""
    x = x.detach()
    if torch.compiler.is_compiling():
        # The partitioner does not know amin as fusible: with it, it would keep all that follows for backward.
        return x.abs().amax(dim=-1, keepdim=True).float().clamp(min=EPS)
    # Two reductions read x twice and write nothing; |x| first would write a copy of it.
    return torch.maximum(x.amax(dim=-1, keepdim=True), -x.amin(dim=-1, keepdim=True)).float().clamp(min=EPS)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 codes and the fp32 absolute maximum of every token.

    No clamp: |x|·(127/a) rounds to 127 at most, and -128 never appears.
    """
    absmax = token_absmax(x)
    # Cast first: torch multiplies tensors of two dtypes ten times slower.
    return (x.detach().float() * (127 / absmax)).round_().to(torch.int8), absmax


def dequantize_activations(q: Tensor, absmax: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The value that int8 activations stand for, scaled in fp32 and then rounded to `dtype`."""
    return q.to(torch.float32).mul_(absmax / 127).to(dtype)
