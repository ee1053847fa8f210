"""Low-Rank Correction: a ternary layer with a small full-precision side path (LRC, arXiv 2412.07902).

                ┌── sparsity ─► Q(x) ──► W ternary, frozen ──┐
     x ─ SubLN ─┤                                            + ──► y
                └──► Vᵀ ──► U   trained ──────────── · λ ────┘

The side path sees the input as it is, before sparsity and quantisation, so that it can make good what these
lose, and after SubLN, so that it is a correction of the same product. λ scales it as it scales the error that
it corrects: at λ = 0 the layer is `nn.Linear` to the bit. Gradients pass straight through the ternary path,
so layers below learn as they do under `BitLinear`.

Shapes: x [..., K]; weight [N, K]; lrc_U [N, r]; lrc_V [K, r]; y [..., N].
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import Self, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet_arch.bitlinear import BitLinear
from bitnet_arch.lrc_solve import ternary_value, truncated_svd
from bitnet_arch.subln import SubLN
from durable import UserError


class LRCInit(StrEnum):
    """Where U and V start. U = V = 0 is no choice: the gradient of each is a multiple of the other."""

    svd = "svd"
    """The best approximation of W - Q(W), by no data."""
    calibrated = "calibrated"
    """The least error on calibration batches, quantised activations included."""
    kaiming = "kaiming"
    """U = 0 and V random: the layer starts as it was. For weights that were trained as ternary ones, whose
    latent values are no better than their codes."""

    @classmethod
    def _missing_(cls, value: object) -> "LRCInit | None":
        return cls.svd if value == "svd_residual" else None


class BitLinearLRC(BitLinear):
    """`BitLinear` plus λ·U(Vᵀx). Weight and bias are frozen, U and V are trained."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | None = None,
        rank_percentage: float = 0.1,
        bias: bool = False,
        *,
        input_norm: SubLN | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        lrc_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, input_norm=input_norm, device=device, dtype=dtype)
        rank = chosen_rank(in_features, out_features, rank=rank, rank_percentage=rank_percentage)
        self._add_factors(rank, lrc_dtype)
        self.init_factors()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, input_norm: SubLN | None = None, rank: int | None = None
    ) -> Self:
        """A corrected layer over the very parameters of `linear`, which are frozen."""
        layer = super().from_linear(linear, input_norm=input_norm)
        rank = chosen_rank(linear.in_features, linear.out_features, rank=rank)
        layer._add_factors(rank, None)
        layer.init_factors()
        return layer

    @classmethod
    def from_bitlinear(cls, source: BitLinear, *, rank: int, lrc_dtype: torch.dtype | None = None) -> Self:
        """The same layer with its dials, sparsity and SubLN, and factors that still need `init_factors`."""
        layer = super().from_linear(source, input_norm=source.input_norm)
        for name in ("quant_amount", "activation_amount", "subln_amount", "sparsity", "backward_dtype"):
            setattr(layer, name, getattr(source, name))
        # Kept on the instance: a layer that never quantised activations still never does.
        layer.__dict__["quantizes_activations"] = source.quantizes_activations
        layer._add_factors(rank, lrc_dtype)
        return layer

    @property
    def rank(self) -> int:
        return self.lrc_U.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalized(x)
        y = self.project(x)
        return y if self._is("quant_amount", 0) else y + self.correction(x)

    def correction(self, x: Tensor) -> Tensor:
        """λ·U(Vᵀx), for x after SubLN."""
        low = F.linear(F.linear(x, self.lrc_V.t().to(x.dtype)), self.lrc_U.to(x.dtype))
        return low if self._is("quant_amount", 1) else low * self._dial("quant_amount")

    @torch.no_grad()
    def init_factors(self, init: LRCInit = LRCInit.svd) -> None:
        """Start U and V over from the weight. The calibrated start needs data: see `set_factors`."""
        if self.weight.is_meta:
            return
        match init:
            case LRCInit.svd:
                latent = self.weight.double()
                self.set_factors(*truncated_svd(latent - ternary_value(self.weight), self.rank))
            case LRCInit.kaiming:
                nn.init.zeros_(self.lrc_U)
                # V is stored [in, r], and its fan-in is the input's width.
                nn.init.kaiming_uniform_(self.lrc_V.t(), a=5**0.5)
            case LRCInit.calibrated:
                raise AssertionError("a calibrated start comes from convert_bitlinear_to_lrc with batches")

    @torch.no_grad()
    def set_factors(self, U: Tensor, V: Tensor) -> None:
        """Write U and V, rounded to their dtype."""
        self.lrc_U.copy_(U)
        self.lrc_V.copy_(V)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"

    def _add_factors(self, rank: int, dtype: torch.dtype | None) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.lrc_U, self.lrc_V = (
            nn.Parameter(self.weight.new_empty(features, rank, dtype=dtype or self.weight.dtype))
            for features in (self.out_features, self.in_features)
        )


def chosen_rank(
    in_features: int,
    out_features: int,
    *,
    rank: int | None = None,
    rank_percentage: float = 0.1,
    bytes_share: float | None = None,
    bytes_per_element: int = 4,
) -> int:
    """The rank of a correction: as given, else by its bytes, else by a share of the smaller width.

    `bytes_share` is how much larger U and V may make the layer: their bytes over those of the ternary weight
    at two bits. A tenth of the full rank in 16 bits can double a ternary layer; this keeps count of it.
    """
    full = min(in_features, out_features)
    if rank is not None:
        if not 1 <= rank <= full:
            raise UserError(f"lrc.rank: must suit a {out_features}x{in_features} layer", rank, f"1 to {full}")
        return rank
    if bytes_share is not None:
        per_rank = (in_features + out_features) * bytes_per_element / (in_features * out_features / 4)
        if not per_rank <= bytes_share:
            raise UserError(
                f"lrc.bytes_share: too little for rank 1 of a {out_features}x{in_features} layer",
                bytes_share,
                f"give at least {per_rank:.3g}, or a smaller dtype for U and V, or a rank",
            )
        return min(full, int(bytes_share / per_rank + 1e-9))
    if not 0 < rank_percentage <= 1:
        raise UserError(
            "lrc.rank_percentage: must be a share of the full rank", rank_percentage, "above 0, up to 1"
        )
    return max(1, int(full * rank_percentage + 1e-9))


def lrc_layers(model: nn.Module) -> Iterator[BitLinearLRC]:
    """Every corrected layer of a model."""
    return (module for module in model.modules() if isinstance(module, BitLinearLRC))


class ParameterCounts(TypedDict):
    """Elements by whether training moves them."""

    trainable: int
    frozen: int


def freeze_model_except_lrc(model: nn.Module) -> ParameterCounts:
    """Leave U and V of every corrected layer trainable and nothing else: norms and embeddings freeze too."""
    factors = {id(factor) for layer in lrc_layers(model) for factor in (layer.lrc_U, layer.lrc_V)}
    if not factors:
        raise UserError(
            f"{type(model).__name__} has no low-rank correction to train",
            "no BitLinearLRC",
            "call convert_bitlinear_to_lrc first",
        )
    counts = ParameterCounts(trainable=0, frozen=0)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in factors)
        counts["trainable" if id(parameter) in factors else "frozen"] += parameter.numel()
    return counts


class LRCStats(TypedDict):
    """What the corrections of a model cost."""

    num_lrc_layers: int
    total_lrc_params: int
    total_frozen_params: int
    """Weights and biases of the corrected layers."""
    average_rank: float
    ranks: list[int]
    lrc_bytes: int
    """U and V as they are stored."""
    ternary_bytes: int
    """The weights of these layers at two bits each, and a scale."""


def get_lrc_stats(model: nn.Module) -> LRCStats:
    """Count the corrections of a model, and their bytes against those of the weights that they correct."""
    layers = list(lrc_layers(model))
    factors = [factor for layer in layers for factor in (layer.lrc_U, layer.lrc_V)]
    frozen = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    ranks = [layer.rank for layer in layers]
    return LRCStats(
        num_lrc_layers=len(layers),
        total_lrc_params=sum(factor.numel() for factor in factors),
        total_frozen_params=sum(parameter.numel() for parameter in frozen),
        average_rank=sum(ranks) / len(ranks) if ranks else 0.0,
        ranks=ranks,
        lrc_bytes=sum(factor.numel() * factor.element_size() for factor in factors),
        ternary_bytes=sum(-(-layer.weight.numel() // 4) + 4 for layer in layers),
    )
