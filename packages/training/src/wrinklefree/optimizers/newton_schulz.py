"""Newton-Schulz: the nearest orthogonal matrix by five products of an odd polynomial (Muon; 2502.16982).

    X ← X / ‖X‖,    five times    X ← P X,   P = a + b·G + c·G²,   G = XXᵀ

The coefficients are chosen for speed near zero, so singular values end between 0.7 and 1.2 and not at 1. In a
low dtype this is `torch.optim.Muon`'s arithmetic to the bit. In fp32, oblong matrices take a shorter way: all
P are polynomials of the first G, so they can be multiplied with each other on the short side, and meet the
long side twice instead of ten times.

Shapes: X [m, n] with m ≤ n (tall matrices are transposed); G and P [m, m].
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from bitnet_arch.gemm import CPU_PREFERS_ONEDNN, has_bf16_gemm, matmul

A, B, C = 3.4445, -4.7750, 2.0315
STEPS = 5
EPS = 1e-7
OBLONG = 1.5
"""From this ratio of the sides on, the way through G is shorter."""


def best_dtype(device_type: str) -> torch.dtype:
    """bf16 where the machine multiplies it; a CPU that emulates it takes four times as long as with fp32."""
    return torch.bfloat16 if has_bf16_gemm(device_type) else torch.float32


def orthogonalized(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """UVᵀ of the singular value decomposition, roughly, computed and returned in `dtype`."""
    is_tall = matrix.size(0) > matrix.size(1)
    x = matrix.to(dtype, copy=True)
    x = x.T if is_tall else x
    x.div_(x.norm().clamp(min=EPS))
    is_oblong = x.size(1) >= OBLONG * x.size(0)
    # Shards have no diagonal to write to.
    is_short = dtype == torch.float32 and is_oblong and not isinstance(x, DTensor)
    x = _through_gram(x) if is_short else _direct(x)
    return x.T if is_tall else x


def _direct(x: Tensor) -> Tensor:
    for _ in range(STEPS):
        gram = _product(x, x.T)
        x = _add_product(x, _add_product(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x


def _through_gram(x: Tensor) -> Tensor:
    gram = _product(x, x.T)
    all_factors: Tensor | None = None
    for step in range(STEPS):
        factor = _add_product(gram, gram, gram, beta=B, alpha=C)
        factor.diagonal().add_(A)
        all_factors = factor if all_factors is None else _product(factor, all_factors)
        if step < STEPS - 1:
            gram = _product(_product(factor, gram), factor)
    assert all_factors is not None
    return _product(all_factors, x)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return matmul(a, b) if CPU_PREFERS_ONEDNN else a @ b


def _add_product(x: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float = 1.0) -> Tensor:
    """beta·x + alpha·ab."""
    if CPU_PREFERS_ONEDNN and x.dtype == torch.float32:
        return matmul(a, b).mul_(alpha).add_(x, alpha=beta)
    return torch.addmm(x, a, b, beta=beta, alpha=alpha)
