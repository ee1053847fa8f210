"""Conversion under the names that earlier versions of this project gave it: doors to `convert_to_bitnet`,
`save_bitnet` and BitLinear.

They also take modules that are no transformers models, and find projections there by name. What they do not
keep: SubLN and projection wrapped in an `nn.Sequential` (the norm lives in the projection, so parameter
names stay), and leaving a model as it was without a word.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bitnet_arch.bitlinear import BitLinear
from bitnet_arch.calibration_batches import Batch
from bitnet_arch.checkpoint import save_bitnet
from bitnet_arch.conversion_config import ConversionConfig, SubLNInit, SubLNPlacement
from bitnet_arch.convert import convert_to_bitnet
from bitnet_arch.subln import SubLN
from bitnet_arch.walk import OUTPUTS, PROJECTIONS
from durable import ExitCode, UserError

log = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)

NEVER_CONVERTED = ("embed_tokens", "lm_head", "embed_positions")
"""What callers used to exclude by hand."""


def convert_linear_to_bitlinear(module: nn.Module, exclude_names: Sequence[str] | None = None) -> nn.Module:
    """Replace every plain `nn.Linear` in a module, in place, but for children of an excluded name and a
    model's head.

    A bare `nn.Linear` comes back as a BitLinear over its parameters.
    """
    if type(module) is nn.Linear:
        return BitLinear.from_linear(module)
    head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
    excluded = set(exclude_names or ())
    converted: dict[nn.Module, BitLinear] = {}
    for parent in list(module.modules()):
        # Not `named_children`, which names a child that is there twice only once.
        for name, child in list(parent._modules.items()):
            if type(child) is nn.Linear and name not in excluded and child is not head:
                # A layer that is used in two places stays one layer.
                parent.register_module(name, converted.setdefault(child, BitLinear.from_linear(child)))
    if not converted:
        raise UserError(
            f"{type(module).__name__} has nothing to convert",
            found="no plain nn.Linear" + (f" outside {', '.join(sorted(excluded))}" if excluded else ""),
            fix="give a module with nn.Linear layers, or exclude fewer",
            exit_code=ExitCode.BAD_INPUT,
        )
    return module


def convert_model_to_bitnet(
    model: Model,
    hidden_size: int,
    intermediate_size: int,
    exclude_layers: Sequence[str] | None = None,
    insert_subln: bool = True,
    *,
    calibration_batches: Iterable[Batch] | None = None,
) -> Model:
    """Convert a decoder in place and return it. SubLN goes in front of o_proj and down_proj; without
    calibration its gains are one.
    """
    _check_sizes(model, hidden_size, intermediate_size)
    excluded = tuple(name for name in exclude_layers or () if name not in NEVER_CONVERTED)
    if insert_subln and calibration_batches is None:
        log.warning("SubLN with gains of one changes a pretrained model much; calibration_batches set them")
    if not hasattr(model, "config"):
        _convert_by_name(model, excluded, insert_subln=insert_subln)
        return model
    config = ConversionConfig(
        exclude=excluded,
        subln=SubLNPlacement.output if insert_subln else SubLNPlacement.none,
        subln_init=SubLNInit.ones if calibration_batches is None else SubLNInit.calibrated,
        calibration_batches=calibration_batches,
    )
    log.info("%s", convert_to_bitnet(model, config))
    return model


def is_bitnet_model(model: nn.Module) -> bool:
    """Is any layer ternary: with or without low-rank correction, packed, ours or transformers'?"""
    return any("BitLinear" in base.__name__ for module in model.modules() for base in type(module).__mro__)


def auto_convert_if_needed(
    model: Model,
    hidden_size: int,
    intermediate_size: int,
    exclude_layers: Sequence[str] | None = None,
    insert_subln: bool = False,
) -> Model:
    """The model itself, converted unless it is ternary already."""
    if is_bitnet_model(model):
        return model
    return convert_model_to_bitnet(model, hidden_size, intermediate_size, exclude_layers, insert_subln)


def run_stage1(
    pretrained_model_name: str,
    output_dir: str | os.PathLike[str],
    hidden_size: int,
    intermediate_size: int,
    exclude_layers: Sequence[str] | None = None,
    save_format: str = "safetensors",
    *,
    insert_subln: bool = True,
    calibration_batches: Iterable[Batch] | None = None,
) -> Path:
    """Load a pretrained decoder, convert it and save it, in the dtype it comes in; `load_bitnet` reads the
    directory.
    """
    if save_format != "safetensors":
        raise UserError(
            "save_format: only safetensors is written; a pickle can run any code when it is loaded",
            found=save_format,
            exit_code=ExitCode.BAD_INPUT,
            choices=["safetensors"],
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(pretrained_model_name)
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{pretrained_model_name}: cannot be loaded as a causal language model with its tokenizer",
            found=str(error).partition("\n")[0],
            fix="give a directory with config.json, weights and tokenizer, or a name that the hub knows",
            exit_code=ExitCode.BAD_INPUT,
        ) from None
    convert_model_to_bitnet(
        model,
        hidden_size,
        intermediate_size,
        exclude_layers,
        insert_subln,
        calibration_batches=calibration_batches,
    )
    return save_bitnet(model, output_dir, tokenizer=tokenizer)


def _check_sizes(model: nn.Module, hidden_size: int, intermediate_size: int) -> None:
    """The sizes were once needed to build norms; now they tell whether the caller means this model."""
    for leaf, name, expected in (
        ("q_proj", "hidden_size", hidden_size),
        ("down_proj", "intermediate_size", intermediate_size),
    ):
        for path, module in model.named_modules():
            if (
                path.rpartition(".")[2] == leaf
                and isinstance(module, nn.Linear)
                and module.in_features != expected
            ):
                raise UserError(
                    f"{name}: {path} takes {module.in_features} features",
                    found=expected,
                    fix=f"pass {name}={module.in_features}",
                    exit_code=ExitCode.BAD_INPUT,
                )


def _convert_by_name(model: nn.Module, excluded: Sequence[str], *, insert_subln: bool) -> None:
    """Ternary layers for everything called like a projection, in a module of any make."""
    found = {
        path: module
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in PROJECTIONS and type(module) is nn.Linear
    }
    chosen = {path: module for path, module in found.items() if not any(name in path for name in excluded)}
    if not chosen:
        raise UserError(
            f"{type(model).__name__} has nothing to convert",
            found=f"{len(found)} nn.Linear named {', '.join(PROJECTIONS)}"
            + (", all excluded" if found else ""),
            fix="use a decoder with such projections, or exclude fewer",
            exit_code=ExitCode.BAD_INPUT,
        )
    for path, linear in chosen.items():
        layer = BitLinear.from_linear(linear)
        if insert_subln and path.rpartition(".")[2] in OUTPUTS:
            weight = linear.weight
            layer.input_norm = SubLN(linear.in_features, device=weight.device, dtype=weight.dtype)
        model.set_submodule(path, layer)
