"""RMSNorm in fp32, and SubLN: the RMSNorm that BitNet puts in front of a quantised projection (BitDistill,
arXiv 2510.13998, eq. 4-5).

A SubLN lives in the projection that it feeds (`BitLinear.input_norm`), so that one place norms and quantises.
The projection blends it in by μ (`subln_amount`): at μ = 0 a converted model is the original, at μ = 1 it is
plain SubLN.
"""

from typing import cast

import torch
from torch import Tensor, nn


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) · weight with fp32 statistics, in the dtype of x (a fp16 300 squares to infinity)."""
    if x.dtype == torch.float32:
        return nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
    wide = nn.functional.rms_norm(x.float(), x.shape[-1:], None if weight is None else weight.float(), eps)
    return wide.to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with a learned gain."""

    weight: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        if elementwise_affine:
            self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast torch would norm in the low dtype on some devices; the statistics are fp32 here.
        return rms_norm(x, cast("Tensor | None", self.weight), self.eps)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}"


class SubLN(RMSNorm):
    """The RMSNorm in front of a ternary projection."""

    is_own = False
    """Part of the architecture before conversion, which moved it into its projection.

    μ is for the SubLNs that conversion adds.
    """


def blend(x: Tensor, target: Tensor, amount: float | Tensor) -> Tensor:
    """(1 - amount)·x + amount·target: exactly x at 0 and exactly target at 1, differentiable in both.

    Not `torch.lerp`: with a Python float it compiles anew for every value.
    """
    return (1 - amount) * x + amount * target
