"""Which class of transformers runs a ternary model, and where that class holds its norms.

    norms inside projections         class                                  where they go
    none                             the model's own                        -
    o and down                       BitNetForCausalLM, if the model fits   the class's sub-norms
    every ternary projection         the model's own; Llama for BitNet      AutoBitLinear's `rms_norm`
    o and down, and it does not fit  the model's own                        `rms_norm`, see `stock`

BitNetForCausalLM is Llama with the two sub-norms, and Llama is it without. So a Llama with SubLN and a
BitNet with a norm in front of everything change places, and both are held exactly.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bitnet_arch.record import BitnetRecord
from bitnet_arch.walk import ATTENTION_INPUTS, FAMILIES, ModelWalk
from durable import ExitCode, UserError

LLAMA_LIKE = ("llama", "mistral", "qwen2")
"""Families that are Llama, up to biases and sliding windows."""
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
    "rope_parameters",
    "dtype",
)
"""What Llama's and BitNet's configurations have in common, and mean the same by."""


@dataclass(frozen=True, slots=True)
class Host:
    """The class that a stock checkpoint names, and how it is used."""

    family: str
    uses_rms_norm: bool = False
    """AutoBitLinear holds a norm in front of every ternary projection."""


def choose_host(
    record: BitnetRecord, walked: ModelWalk, config: Mapping[str, Any], biases: Collection[str]
) -> Host:
    """The class that holds the model, exactly where there is one. `biases` are the projections that have
    one.
    """
    inserted, own = set(record.subln.inserted), set(record.subln.own)
    if not inserted:
        return Host(walked.family)
    if inserted | own == set(record.ternary):
        if walked.family != "bitnet":
            return Host(walked.family, uses_rms_norm=True)
        if own == set(walked.sub_norms):
            return Host("llama", uses_rms_norm=True)
    if inserted == set(walked.output_projections) and _fits_bitnet(walked, config, biases):
        return Host("bitnet")
    _require_movable(inserted | own, record, walked)
    return Host(walked.family, uses_rms_norm=True)


def host_config(
    host: Host, walked: ModelWalk, config: dict[str, Any], biases: Collection[str]
) -> dict[str, Any]:
    """`config.json` for the host."""
    if host.family == walked.family:
        return config
    return {name: config[name] for name in SHARED_FIELDS} | {
        "model_type": host.family,
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[host.family]],
        "attention_bias": bool(biases),
        "head_dim": walked.head_dim,
    }


def host_sub_norms(host: Host, walked: ModelWalk) -> dict[str, str]:
    """Projection → where the host's class has a norm in front of it."""
    names = FAMILIES[host.family].sub_norms
    return {
        layer.projections[name]: f"{layer.path}.{norm}"
        for layer in walked.layers
        for name, norm in names.items()
    }


def _fits_bitnet(walked: ModelWalk, config: Mapping[str, Any], biases: Collection[str]) -> bool:
    """Llama-like, heads as wide as the hidden state, full attention, and biases at most on q, k, v and o."""
    attention = {layer.projections[name] for layer in walked.layers for name in (*ATTENTION_INPUTS, "o_proj")}
    return (
        walked.family in LLAMA_LIKE
        and walked.num_heads * walked.head_dim == walked.hidden_size
        and all(layer.sliding_window is None for layer in walked.layers)
        and attention.issuperset(biases)
        and "rope_parameters" in config
    )


def _require_movable(normed: set[str], record: BitnetRecord, walked: ModelWalk) -> None:
    """`rms_norm` norms the input of every ternary projection: it must be normed already, in or in front of
    it.
    """
    if set(walked.sub_norms) - set(record.subln.own):
        raise _cannot_hold(
            next(iter(set(walked.sub_norms) - set(record.subln.own))), "its own sub-norm, left dense"
        )
    for path in record.ternary:
        if path in walked.output_projections and path not in normed:
            raise _cannot_hold(path, "no SubLN, where others have one")
    for layer in walked.layers:
        for readers in layer.fed_by.values():
            bare = [path for path in readers if path in record.ternary and path not in normed]
            if bare and len(bare) < len(readers):
                raise _cannot_hold(bare[0], "another kind of projection behind the same norm")


def _cannot_hold(path: str, found: str) -> UserError:
    return UserError(
        'layout="stock": transformers cannot hold these norms',
        found=f"{path} with {found}",
        fix='convert q, k and v alike, and gate and up; or save with layout="training"',
        exit_code=ExitCode.BAD_INPUT,
    )
