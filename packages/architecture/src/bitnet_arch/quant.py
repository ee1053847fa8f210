"""The quantisation contract that training, packing, export and verification share.

Weights, per tensor (BitNet b1.58, arXiv 2402.17764): s = max(mean|W|, 1e-5), codes = clip(round(W/s), -1, 1), value s·codes.
Activations, per token: a = max(max|x|, 1e-5), q = round(x·(127/a)), value a/127·q. Rounding is half to even, statistics are fp32,
and the weight is quantised as stored, before any autocast cast.

Shapes: weight [N, K]; x [..., K]; q [..., K]; absmax [..., 1].
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


def weight_scale(weight: Tensor) -> Tensor:
    """Mean absolute weight of the whole tensor, the same on any number of threads.

    A plain fp32 mean depends on how threads split the sum, and with it a code now and then; so does a compiled one. One row is
    short enough for fp32, the sum over rows is taken in float64.
    """
    row_sums = weight.float().abs().sum(dim=-1).double()
    return (row_sums.sum() / weight.numel()).float().clamp(min=EPS)


def quantize_weight(weight: Tensor) -> TernaryWeight:
    """Round a weight to {-1, 0, +1} and its scale."""
    scale = weight_scale(weight)
    # Fresh memory from the division, so the rest may work in place.
    codes = (weight.float() / scale).round_().clamp_(-1, 1).to(torch.int8)
    return TernaryWeight(codes, scale)


def ternary(weight: Tensor) -> Tensor:
    """The value of the quantised weight, in the dtype of the weight."""
    codes, scale = quantize_weight(weight)
    return (codes * scale).to(weight.dtype)


def token_absmax(x: Tensor) -> Tensor:
    """Largest magnitude of every token, in fp32; NaN and Inf stay visible."""
    low, high = torch.aminmax(x.detach(), dim=-1, keepdim=True)
    return torch.maximum(high, -low).float().clamp(min=EPS)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 codes and the fp32 absolute maximum of every token."""
    absmax = token_absmax(x)
    return round_to_grid(x, absmax).to(torch.int8), absmax


def round_to_grid(x: Tensor, absmax: Tensor) -> Tensor:
    """The integers of `quantize_activations`, still in fp32. No clamp: |x|·(127/a) rounds to at most 127."""
    return (x.detach() * (127 / absmax)).round_()


def dequantize_activations(q: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """The value that int8 activations stand for."""
    return (q * (absmax / 127)).to(dtype)
