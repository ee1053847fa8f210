"""What an engine's graph must be told about a model: widths, heads, eps, rotations, windows.

Everything comes from the configuration; what a key cannot say is refused.
"""

import math
from collections.abc import Mapping
from typing import Any

from bitnet_arch.record import BitnetRecord
from bitnet_arch.walk import ModelWalk
from bitnet_serving.architectures import Architecture, refused
from bitnet_serving.gguf_values import MetaValue


def model_metadata(
    architecture: Architecture,
    walked: ModelWalk,
    config: Mapping[str, Any],
    record: BitnetRecord,
    *,
    vocab_size: int,
) -> dict[str, MetaValue]:
    """What the graph must be told, from the configuration (after padding, where there is any)."""
    if record.subln.eps is not None and not math.isclose(record.subln.eps, walked.rms_norm_eps, rel_tol=1e-6):
        raise refused(
            "engines have one eps for all norms",
            f"rms_norm_eps {walked.rms_norm_eps:g}, SubLN {record.subln.eps:g}",
            "train with the model's eps in its SubLNs",
        )
    arch, head_dim = architecture.name, walked.head_dim
    heads, kv_heads = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
    metadata: dict[str, MetaValue] = {
        f"{arch}.vocab_size": vocab_size,
        f"{arch}.context_length": context_length(architecture, walked, config),
        f"{arch}.embedding_length": int(config["hidden_size"]),
        f"{arch}.block_count": len(walked.layers),
        f"{arch}.feed_forward_length": int(config["intermediate_size"]),
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": kv_heads,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{arch}.rope.dimension_count": head_dim,
    }
    ropes = rope_parameters(config)
    metadata[f"{arch}.rope.freq_base"] = float(ropes["full_attention"]["rope_theta"])
    metadata |= _rope_scaling(architecture, ropes["full_attention"])
    if arch == "gemma3":
        metadata |= _gemma3_metadata(walked, config, ropes)
    return metadata


def context_length(architecture: Architecture, walked: ModelWalk, config: Mapping[str, Any]) -> int:
    """Where a graph knows no sliding window, the context ends with it: up to there both are the same."""
    windows = [layer.sliding_window for layer in walked.layers if layer.sliding_window is not None]
    length = int(config["max_position_embeddings"])
    return min([length, *windows]) if architecture.name != "gemma3" else length


def rope_parameters(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By kind of layer; most models have one set for all."""
    ropes = config["rope_parameters"]
    return ropes if "full_attention" in ropes else {"full_attention": ropes}


def _rope_scaling(architecture: Architecture, rope: Mapping[str, Any]) -> dict[str, MetaValue]:
    """`llama3` is a tensor of factors, see `rope_factors`."""
    match rope.get("rope_type", "default"):
        case "default":
            return {}
        case "linear":
            return {
                f"{architecture.name}.rope.scaling.type": "linear",
                f"{architecture.name}.rope.scaling.factor": float(rope["factor"]),
            }
        case "llama3" if architecture.name == "llama":
            return {}
        case other:
            raise refused(
                f"`{architecture.name}` is not written with these rotations",
                f"rope_type {other}",
                "use default or linear ones (llama: also llama3)",
            )


def rope_factors(config: Mapping[str, Any], head_dim: int) -> list[float] | None:
    """What each frequency is divided by, for `rope_type: llama3` (transformers' own formula)."""
    rope = rope_parameters(config)["full_attention"]
    if rope.get("rope_type") != "llama3":
        return None
    factor, low, high = (float(rope[n]) for n in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(rope["original_max_position_embeddings"])
    factors: list[float] = []
    for pair in range(head_dim // 2):
        turns = original / (2 * math.pi * float(rope["rope_theta"]) ** (2 * pair / head_dim))
        if turns > high:
            factors.append(1.0)
        elif turns < low:
            factors.append(factor)
        else:
            smooth = (turns - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _gemma3_metadata(
    walked: ModelWalk, config: Mapping[str, Any], ropes: Mapping[str, Mapping[str, Any]]
) -> dict[str, MetaValue]:
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(name) is not None:
            raise refused("`gemma3` caps no logits", f"{name} {config[name]}", "use a model without it")
    if float(config["query_pre_attn_scalar"]) != walked.head_dim:
        raise refused(
            "`gemma3` divides by the root of head_dim",
            f"query_pre_attn_scalar {config['query_pre_attn_scalar']}, head_dim {walked.head_dim}",
            "use a model where they are the same",
        )
    slides = [layer.sliding_window is not None for layer in walked.layers]
    if not any(slides):
        return {}
    sliding_rope = ropes["sliding_attention"]
    if sliding_rope.get("rope_type", "default") != "default":
        raise refused(
            "`gemma3` does not scale rotations of sliding layers",
            f"rope_type {sliding_rope['rope_type']}",
            "use default ones there",
        )
    return {
        "gemma3.attention.sliding_window": int(config["sliding_window"]),
        "gemma3.attention.sliding_window_pattern": _period(slides),
        "gemma3.rope.freq_base_swa": float(sliding_rope["rope_theta"]),
    }


def _period(slides: list[bool]) -> int:
    """Engines let every n-th layer see everything, and all others slide."""
    for period in range(1, len(slides) + 2):
        if slides == [index % period < period - 1 for index in range(len(slides))]:
            return period
    raise refused(
        "engines let every n-th layer see everything",
        "layer_types " + "".join("s" if each else "f" for each in slides),
        "use a regular pattern",
    )
