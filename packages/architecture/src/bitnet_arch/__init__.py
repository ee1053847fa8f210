"""Ternary (1.58-bit) layers that train faster than dense ones, for Hugging Face decoders.

Layers and their dials, conversion, low-rank correction, checkpoints; `bitnet_arch.testing` has tiny models.
"""

from bitnet_arch.bitlinear import (
    BitLinear,
    BitLinearNoActivationQuant,
    forget_quantized_weights,
    set_backward_dtype,
    set_quant_amount,
    set_sparsity,
    set_subln_amount,
)
from bitnet_arch.checkpoint import load_bitnet, load_packed, save_bitnet
from bitnet_arch.conversion_config import ConversionConfig, HiddenAct, SubLNInit, SubLNPlacement
from bitnet_arch.convert import ConversionReport, convert_to_bitnet
from bitnet_arch.diffusion import (
    BlockDiffusion,
    add_mask_token,
    block_diffusion_of,
    check_mask_token,
    set_block_diffusion,
    start_mask_at_mean,
)
from bitnet_arch.lrc import BitLinearLRC, LRCInit, freeze_model_except_lrc, get_lrc_stats
from bitnet_arch.lrc_convert import convert_bitlinear_to_lrc
from bitnet_arch.quant import TernaryWeight, quantize_activations, quantize_weight
from bitnet_arch.seed_names import (
    auto_convert_if_needed,
    convert_linear_to_bitlinear,
    convert_model_to_bitnet,
    is_bitnet_model,
    run_stage1,
)
from bitnet_arch.sparsity import Sparsity
from bitnet_arch.subln import RMSNorm, SubLN
from bitnet_arch.subln_calibration import calibrate_subln
from bitnet_arch.walk import ModelWalk, walk
from bitnet_arch.warmup import BitLinearWithWarmup, LambdaWarmup, Schedule, ramp_amount

__all__ = [
    "BitLinear",
    "BitLinearLRC",
    "BitLinearNoActivationQuant",
    "BitLinearWithWarmup",
    "BlockDiffusion",
    "ConversionConfig",
    "ConversionReport",
    "HiddenAct",
    "LRCInit",
    "LambdaWarmup",
    "ModelWalk",
    "RMSNorm",
    "Schedule",
    "Sparsity",
    "SubLN",
    "SubLNInit",
    "SubLNPlacement",
    "TernaryWeight",
    "add_mask_token",
    "auto_convert_if_needed",
    "block_diffusion_of",
    "calibrate_subln",
    "check_mask_token",
    "convert_bitlinear_to_lrc",
    "convert_linear_to_bitlinear",
    "convert_model_to_bitnet",
    "convert_to_bitnet",
    "forget_quantized_weights",
    "freeze_model_except_lrc",
    "get_lrc_stats",
    "is_bitnet_model",
    "load_bitnet",
    "load_packed",
    "quantize_activations",
    "quantize_weight",
    "ramp_amount",
    "run_stage1",
    "save_bitnet",
    "set_backward_dtype",
    "set_block_diffusion",
    "set_quant_amount",
    "set_sparsity",
    "set_subln_amount",
    "start_mask_at_mean",
    "walk",
]
