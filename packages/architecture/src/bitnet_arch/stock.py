"""The stock layout: a ternary model that plain transformers loads, with no code of ours.

transformers replaces every ternary projection by its AutoBitLinear, which quantises as our contract says.
Latent weights are quantised at every forward (`online`). Packed ones are codes and a scale (`offline`);
AutoBitLinear scales after it has added the bias, so biases are stored divided by the scale. `stock_host`
says which class runs the model and where the norms go.

Where AutoBitLinear has to norm the input of every projection (`use_rms_norm`) and q, k, v have no SubLN,
the gain of the layer norm in front of them moves into theirs:

    g ⊙ x/√(m + ε)   becomes   g ⊙ n/√(mean n² + ε)   with   n = c·x/√(m + ε),   m = mean x²

The RMSNorm of a normalised vector is that vector up to ε, and exactly where c² = m + ε. So c is the typical
√(m + ε) where that is known, in front of the first layer, and 1 deeper down, where m is far above ε.

What this layout cannot hold to the bit (moved gains, divided biases) is kept beside it, for our own reader.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitnet_arch.packed import can_pack, pack, unpack
from bitnet_arch.quant import TernaryWeight, quantize_weight
from bitnet_arch.record import BitnetRecord, StockRecord
from bitnet_arch.stock_host import Host, choose_host, host_config, host_sub_norms
from bitnet_arch.walk import ATTENTION_INPUTS, ModelWalk
from durable import ExitCode, UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class StockFiles:
    """A model in the stock layout."""

    tensors: dict[str, Tensor]
    originals: dict[str, Tensor]
    """Those that the layout has changed, as the model has them."""
    config: dict[str, Any]
    record: BitnetRecord


def to_stock(
    tensors: Mapping[str, Tensor],
    config: dict[str, Any],
    record: BitnetRecord,
    walked: ModelWalk,
    *,
    dense: list[str],
) -> StockFiles:
    """From a model's tensors, named as in its state dict. `dense` are its linear layers that stay so."""
    _require_finished(record)
    biased = [path for path in walked.projections if f"{path}.bias" in tensors]
    host = choose_host(record, walked, config, biased)
    stock = dict(tensors)
    names = _place_norms(stock, record, walked, host)
    if host.family == "bitnet" and biased:
        _complete_biases(stock, walked)
    if record.packed:
        _pack_all(stock, record)
    packed_names = {f"{path}.{leaf}" for path in record.ternary for leaf in ("weight", "weight_scale")}
    is_foreign = host.family != walked.family
    return StockFiles(
        tensors=stock,
        originals={
            name: tensor
            for name, tensor in tensors.items()
            if stock.get(name, tensor) is not tensor and name not in packed_names
        },
        config=host_config(host, walked, config, biased)
        | {"quantization_config": _quantization_config(record, walked, host, dense)},
        record=replace(
            record,
            stock=StockRecord(
                config=config if is_foreign else None,
                names=names,
                added=tuple(n for n in stock if names.get(n, n) not in tensors and n not in packed_names),
            ),
        ),
    )


def from_stock(
    tensors: Mapping[str, Tensor], originals: Mapping[str, Tensor], record: BitnetRecord
) -> dict[str, Tensor]:
    """Back to what `to_stock` was given; packed weights are codes and scale."""
    assert record.stock is not None
    names, added = record.stock.names, set(record.stock.added)
    training = {names.get(name, name): tensor for name, tensor in tensors.items() if name not in added}
    training.update(originals)
    if record.packed:
        for path in record.ternary:
            weight, scale = training[f"{path}.weight"], training[f"{path}.weight_scale"]
            training[f"{path}.weight"] = (
                unpack(weight) if weight.dtype == torch.uint8 else weight.to(torch.int8)
            )
            training[f"{path}.weight_scale"] = scale.reshape(())
    return training


def ternary_weights(tensors: Mapping[str, Tensor], record: BitnetRecord) -> dict[str, TernaryWeight]:
    """Codes and scale of every ternary projection, from the tensors of `from_stock` or of a training
    checkpoint.
    """
    if record.packed:
        return {
            path: TernaryWeight(tensors[f"{path}.weight"], tensors[f"{path}.weight_scale"])
            for path in record.ternary
        }
    return {path: quantize_weight(tensors[f"{path}.weight"]) for path in record.ternary}


def _require_finished(record: BitnetRecord) -> None:
    """The layers of transformers know neither λ and μ nor sparsity nor low-rank correction."""
    problems = [f"{path} with a low-rank correction" for path in record.lrc]
    for path in record.ternary:
        settings = record.settings_of(path)
        amounts = ("quant_amount", "activation_amount", "subln_amount")
        wrong = [f"{name} {settings[name]:g}" for name in amounts if settings[name] != 1]
        if not settings["quantizes_activations"]:
            wrong = ["activations that are not quantised"]
        if settings["sparsity"] and settings["sparsity"]["ratio"]:
            wrong.append(f"sparsity {settings['sparsity']['ratio']:g}")
        if wrong:
            problems.append(f"{path} with {', '.join(wrong)}")
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise UserError(
            'layout="stock": transformers runs only λ = μ = 1, without sparsity and low-rank correction',
            found=problems[0] + more,
            fix='save with layout="training", or bring the model there with set_quant_amount and its sisters',
            exit_code=ExitCode.BAD_INPUT,
        )


def _quantization_config(
    record: BitnetRecord, walked: ModelWalk, host: Host, dense: list[str]
) -> dict[str, Any]:
    return {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline" if record.packed else "online",
        "use_rms_norm": host.uses_rms_norm,
        "rms_norm_eps": record.subln.eps if host.uses_rms_norm else walked.rms_norm_eps,
        "modules_to_not_convert": dense,
    }


def _place_norms(
    stock: dict[str, Tensor], record: BitnetRecord, walked: ModelWalk, host: Host
) -> dict[str, str]:
    """Put every norm where the host has it. Returns new name → old name of what was only renamed."""
    names: dict[str, str] = {}
    sub_norms = host_sub_norms(host, walked)
    for path in (*record.subln.inserted, *record.subln.own):
        name = f"{path}.rms_norm.weight" if host.uses_rms_norm else f"{sub_norms[path]}.weight"
        names[name] = f"{path}.input_norm.weight"
        stock[name] = stock.pop(names[name])
    if host.uses_rms_norm:
        for layer in walked.layers:
            for norm, readers in layer.fed_by.items():
                if all(path in record.ternary and f"{path}.rms_norm.weight" not in stock for path in readers):
                    is_first = norm == walked.layers[0].attention_norm
                    _move_gain(
                        stock, norm, readers, walked, c=_typical_rms(stock, walked) if is_first else 1.0
                    )
    return names


def _move_gain(
    stock: dict[str, Tensor], norm: str, readers: tuple[str, ...], walked: ModelWalk, *, c: float
) -> None:
    weight = stock[f"{norm}.weight"]
    stock[f"{norm}.weight"] = torch.full_like(weight, c - walked.gain_offset)
    for path in readers:
        # Each its own memory: a file holds no tensor under two names.
        stock[f"{path}.rms_norm.weight"] = weight.float() + walked.gain_offset


def _typical_rms(stock: Mapping[str, Tensor], walked: ModelWalk) -> float:
    """√(m + ε) of the median embedding, which is what the first norm sees."""
    embedding = stock[f"{walked.embedding}.weight"].float() * walked.embedding_scale
    return float((embedding.square().mean(-1).median() + walked.rms_norm_eps).sqrt())


def _complete_biases(stock: dict[str, Tensor], walked: ModelWalk) -> None:
    """BitNet has biases on all of q, k, v and o, or on none."""
    for layer in walked.layers:
        for name in (*ATTENTION_INPUTS, "o_proj"):
            path = layer.projections[name]
            weight = stock[f"{path}.weight"]
            stock.setdefault(f"{path}.bias", weight.new_zeros(weight.shape[0]))


def _pack_all(stock: dict[str, Tensor], record: BitnetRecord) -> None:
    for path in record.ternary:
        weight = stock[f"{path}.weight"]
        is_packed = weight.dtype == torch.int8
        codes, scale = (weight, stock[f"{path}.weight_scale"]) if is_packed else quantize_weight(weight)
        # Rows that do not fill bytes stay codes, which transformers takes as they are.
        stock[f"{path}.weight"] = pack(codes) if can_pack(codes.shape[0]) else codes.float()
        stock[f"{path}.weight_scale"] = scale.reshape(1)
        if f"{path}.bias" in stock:
            bias = stock[f"{path}.bias"]
            stock[f"{path}.bias"] = (bias.float() / scale).to(bias.dtype)
