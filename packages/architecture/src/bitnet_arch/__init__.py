"""Ternary (1.58-bit) layers that train faster than dense ones, for Hugging Face decoders."""

from bitnet_arch.bitlinear import (
    BitLinear,
    BitLinearNoActivationQuant,
    forget_quantized_weights,
    set_backward_dtype,
    set_quant_amount,
    set_sparsity,
    set_subln_amount,
)
from bitnet_arch.quant import TernaryWeight, quantize_activations, quantize_weight
from bitnet_arch.sparsity import Sparsity
from bitnet_arch.subln import RMSNorm, SubLN

__all__ = [
    "BitLinear",
    "BitLinearNoActivationQuant",
    "RMSNorm",
    "Sparsity",
    "SubLN",
    "TernaryWeight",
    "forget_quantized_weights",
    "quantize_activations",
    "quantize_weight",
    "set_backward_dtype",
    "set_quant_amount",
    "set_sparsity",
    "set_subln_amount",
]
