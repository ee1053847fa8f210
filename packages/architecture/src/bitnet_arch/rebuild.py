"""A ternary model from its configuration, its record and its tensors.

The architecture is built without memory for its parameters, converted as the record says, and handed the
tensors as they are: dtypes come back as they were saved, and nothing is initialised only to be overwritten.
Classes come from transformers alone; code that a configuration points to is never run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from bitnet_arch.bitlinear import BitLinear, BitLinearNoActivationQuant
from bitnet_arch.convert import adopt_norm
from bitnet_arch.lrc import BitLinearLRC
from bitnet_arch.packed import PackedBitLinear
from bitnet_arch.quant import TernaryWeight
from bitnet_arch.record import BitnetRecord
from bitnet_arch.sparsity import Sparsity
from bitnet_arch.subln import SubLN
from bitnet_arch.walk import FAMILIES, config_of, linear_at, walk
from durable import ExitCode, UserError

NAMED = 3
"""How many tensors a message names."""


def read_config(directory: Path, record: BitnetRecord) -> dict[str, Any]:
    """The model's own configuration, also where `config.json` names another class."""
    path = directory / "config.json"
    try:
        in_file = json.loads(path.read_text(encoding="utf-8"))
        config = dict(record.stock.config) if record.stock and record.stock.config else dict(in_file)
        model_type = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _bad_config(path, type(error).__name__) from None
    if model_type not in FAMILIES:
        raise _bad_config(path, f"model type {model_type!r}")
    config.pop("quantization_config", None)
    return config


def empty_model(directory: Path, record: BitnetRecord) -> PreTrainedModel:
    """The dense architecture of the model, its parameters without memory, its buffers computed."""
    content = read_config(directory, record)
    # The file's dtype would become that of the buffers, which are fp32 whatever the weights are.
    content.pop("dtype", None)
    try:
        config = AutoConfig.for_model(**content)
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever transformers and the libraries that validate for it raise
        raise _bad_config(directory / "config.json", f"{type(error).__name__}: {error}") from error
    return model


def make_ternary(model: nn.Module, record: BitnetRecord, source: Path) -> None:
    """Convert as the record says, without a look at any weight."""
    unknown = sorted(set(record.ternary) - set(walk(model).projections))
    if unknown:
        raise UserError(
            f"{source}: bitnet.json and config.json belong to different models",
            found=f"{unknown[0]} is no projection of this one",
            fix="copy the directory again; its files belong together",
            exit_code=ExitCode.BAD_DATA,
        )
    for path in record.ternary:
        settings = record.settings_of(path)
        kind = BitLinear if settings["quantizes_activations"] else BitLinearNoActivationQuant
        layer = kind.from_linear(linear_at(model, path))
        if path in record.subln.own:
            layer.input_norm = adopt_norm(model, record.subln.own[path], eps=_eps(record))
        elif path in record.subln.inserted:
            layer.input_norm = SubLN(layer.in_features, eps=_eps(record), device="meta")
        _apply_settings(layer, settings)
        if path in record.lrc:
            layer = BitLinearLRC.from_bitlinear(layer, rank=record.lrc[path])
        if record.packed:
            codes = torch.empty(layer.weight.shape, dtype=torch.int8, device="meta")
            layer = PackedBitLinear.from_bitlinear(
                layer, TernaryWeight(codes, torch.empty((), device="meta"))
            )
        model.set_submodule(path, layer)


def hand_over(model: nn.Module, tensors: Mapping[str, Tensor], record: BitnetRecord, source: Path) -> None:
    """Give the model its tensors, which must be exactly those that it has, in shape too."""
    expected = {name: t.shape for name, t in model.state_dict().items() if name not in record.ties}
    problems = [
        *(f"{name} is missing" for name in expected if name not in tensors),
        *(f"{name} is unexpected" for name in tensors if name not in expected),
        *(
            f"{name} is {_shape(tensors[name].shape)} and must be {_shape(shape)}"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ),
    ]
    if problems:
        more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise UserError(
            f"{source}: tensors do not fit config.json and bitnet.json: {', '.join(problems[:NAMED])}{more}",
            fix="copy the directory again; its files belong together",
            exit_code=ExitCode.BAD_DATA,
        )
    model.load_state_dict(dict(tensors), assign=True, strict=False)
    for name, stored in record.ties.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(stored))
    for name, dtype in record.buffer_dtypes.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, leaf, getattr(module, leaf).to(getattr(torch, dtype)))


def finish(model: PreTrainedModel, directory: Path) -> None:
    """Evaluation mode and the generation settings, as `from_pretrained` leaves a model."""
    model.eval()
    path = directory / "generation_config.json"
    if path.is_file():
        model.generation_config = GenerationConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    config_of(model).dtype = model.get_parameter(f"{walk(model).embedding}.weight").dtype


def _apply_settings(layer: BitLinear, settings: Mapping[str, Any]) -> None:
    sparsity = settings["sparsity"]
    layer.quant_amount = settings["quant_amount"]
    layer.activation_amount = settings["activation_amount"]
    layer.subln_amount = settings["subln_amount"]
    layer.sparsity = None if sparsity is None else Sparsity(**sparsity)


def _eps(record: BitnetRecord) -> float:
    assert record.subln.eps is not None
    return record.subln.eps


def _shape(shape: torch.Size) -> str:
    return "×".join(map(str, shape)) or "a scalar"


def _bad_config(path: Path, found: str) -> UserError:
    return UserError(
        f"{path}: not the configuration of a supported decoder",
        found=found,
        fix=f"save the model again with save_bitnet; supported are {', '.join(FAMILIES)}",
        exit_code=ExitCode.BAD_DATA,
    )
