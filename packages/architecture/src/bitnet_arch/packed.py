"""Ternary weights without latent ones: two bits each in a file, int8 in memory.

Quantising s·codes again would give another scale (zeros lower the mean), so a packed weight is never turned
back into a dense one that is quantised: the layer multiplies with the codes and the scale it was given.

Packing is transformers': row r of the packed tensor holds rows r, r + N/4, r + 2N/4, r + 3N/4 of the codes,
lowest bits first, as code + 1.

Shapes: codes [N, K] int8; packed [N/4, K] uint8.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from bitnet_arch.bitlinear import BitLinear
from bitnet_arch.quant import TernaryWeight
from bitnet_arch.ternary_cache import WeightCache
from durable import ExitCode, UserError

VALUES_PER_ITEM = 4
"""Codes in a byte."""


def can_pack(num_rows: int) -> bool:
    """transformers unpacks whole groups of four rows, and takes any other number for codes."""
    return num_rows % VALUES_PER_ITEM == 0


def pack(codes: Tensor) -> Tensor:
    """Four codes per byte."""
    assert can_pack(codes.shape[0]), f"{codes.shape[0]} rows"
    quarters = (codes + 1).to(torch.uint8).chunk(VALUES_PER_ITEM)
    packed = quarters[0]
    for position, quarter in enumerate(quarters[1:], start=1):
        packed = packed | quarter << (2 * position)
    return packed


def unpack(packed: Tensor) -> Tensor:
    """The codes of `pack`. Not transformers' own function, which compiles itself at its first call."""
    rows = [(packed >> (2 * position)) & 3 for position in range(VALUES_PER_ITEM)]
    return torch.cat(rows).to(torch.int8) - 1


class PackedBitLinear(BitLinear):
    """A ternary layer that has codes and a scale and no latent weight: for running, saving and exporting,
    not for training.
    """

    weight_scale: Tensor

    @classmethod
    def from_bitlinear(cls, source: BitLinear, weight: TernaryWeight) -> Self:
        """The layer `source` with the quantised weight given, whatever its latent weight was."""
        layer = cls(source.in_features, source.out_features, input_norm=source.input_norm, device="meta")
        layer.weight = nn.Parameter(weight.codes, requires_grad=False)
        layer.register_buffer("weight_scale", weight.scale)
        layer.bias = source.bias
        return layer.train(source.training)

    def ternary_weight(self) -> TernaryWeight:
        """Codes and scale."""
        return TernaryWeight(self.weight.detach(), self.weight_scale)

    def _blended_weight(self) -> Tensor:
        return self.ternary_weight().value()

    @property
    def _cache(self) -> WeightCache:
        return _GivenWeight(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("quant_amount", "activation_amount") and value != 1:
            raise UserError(
                f"{name}: packed weights are fully quantised",
                found=value,
                fix="load the training checkpoint that they were packed from",
                exit_code=ExitCode.BAD_INPUT,
            )
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        scale = self.weight_scale
        super()._apply(fn, recurse)
        # `model.bfloat16()` must not round the scale.
        self.weight_scale = scale.to(self.weight_scale.device)
        return self


class _GivenWeight(WeightCache):
    """Where a layer would quantise its weight, hand it the codes that it has."""

    def __init__(self, layer: PackedBitLinear) -> None:
        super().__init__()
        self._layer = layer

    def get(self, weight: Tensor) -> TernaryWeight:
        return self._layer.ternary_weight()
