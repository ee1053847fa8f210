"""Where everything is in a decoder: the one place that knows model families.

Conversion, checkpoints, training and export ask `walk(model)` for paths and numbers and never look for
names themselves. A family is one row of `FAMILIES`. What a decoder layer holds, in the order in which the
hidden state meets it:

    attention_norm ─► q k v ─► [q_norm k_norm] ─► attention ─► [sub-norm] ─► o ─► [after_attention] ─► +
    mlp_norm       ─► gate up ─► activation, product       ─► [sub-norm] ─► down ─► [after_mlp]     ─► +

Names in brackets exist in some families only. A sub-norm that conversion moved into its projection leaves
an `nn.Identity` behind.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from durable import ExitCode, UserError

ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
MLP_INPUTS = ("gate_proj", "up_proj")
OUTPUTS = ("o_proj", "down_proj")
"""The projections that write into the residual stream; the ones that SubLN normalises in BitNet."""
PROJECTIONS = (*ATTENTION_INPUTS, "o_proj", *MLP_INPUTS, "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one family of decoders names its parts, and what its norms compute."""

    mlp_norm: str = "post_attention_layernorm"
    after_attention_norm: str | None = None
    after_mlp_norm: str | None = None
    has_query_key_norms: bool = False
    sub_norms: dict[str, str] = field(default_factory=dict)
    """Projection → path inside the layer of the norm that the family itself has in front of it."""
    gain_offset: float = 0.0
    """A norm multiplies by its weight plus this."""
    scales_embedding: bool = False
    """The embedding is multiplied by the root of the hidden size before the first layer."""
    activation_field: str = "hidden_act"
    """Where the configuration names the activation."""


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(has_query_key_norms=True),
    "gemma3_text": Family(
        mlp_norm="pre_feedforward_layernorm",
        after_attention_norm="post_attention_layernorm",
        after_mlp_norm="post_feedforward_layernorm",
        has_query_key_norms=True,
        gain_offset=1.0,
        scales_embedding=True,
        activation_field="hidden_activation",
    ),
    "bitnet": Family(sub_norms={"o_proj": "self_attn.attn_sub_norm", "down_proj": "mlp.ffn_sub_norm"}),
}
"""By `config.model_type`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWalk:
    """Module paths of one decoder layer."""

    path: str
    mlp: str
    projections: dict[str, str]
    """q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj → path."""
    attention_norm: str
    """Feeds q, k and v, and nothing else."""
    mlp_norm: str
    """Feeds gate and up, and nothing else."""
    after_attention_norm: str | None
    after_mlp_norm: str | None
    query_norm: str | None
    key_norm: str | None
    sub_norms: dict[str, str]
    """Projection path → path of the family's own norm in front of it."""
    sliding_window: int | None

    @property
    def fed_by(self) -> dict[str, tuple[str, ...]]:
        """Path of a norm → paths of the projections that read its output."""
        return {
            self.attention_norm: tuple(self.projections[name] for name in ATTENTION_INPUTS),
            self.mlp_norm: tuple(self.projections[name] for name in MLP_INPUTS),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWalk:
    """What is where in a decoder, with the numbers that describe its shape."""

    family: str
    layers: tuple[LayerWalk, ...]
    embedding: str
    final_norm: str
    head: str
    is_tied: bool
    """The head's weight is the embedding's."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    activation: str
    activation_field: str
    gain_offset: float
    """A norm multiplies by its weight plus this."""
    embedding_scale: float
    """What the embedding is multiplied by before the first layer."""

    @property
    def projections(self) -> tuple[str, ...]:
        """Paths of all projections, layer by layer."""
        return tuple(path for layer in self.layers for path in layer.projections.values())

    @property
    def output_projections(self) -> tuple[str, ...]:
        """Paths of o_proj and down_proj, layer by layer."""
        return tuple(layer.projections[name] for layer in self.layers for name in OUTPUTS)

    @property
    def sub_norms(self) -> dict[str, str]:
        """Projection path → path of the family's own norm in front of it, over all layers."""
        return {projection: norm for layer in self.layers for projection, norm in layer.sub_norms.items()}


def walk(model: nn.Module) -> ModelWalk:
    """Find the parts of a decoder, before or after conversion."""
    family_name, family = _family_of(model)
    config = config_of(model)
    activation = str(getattr(config, family.activation_field))
    num_heads = int(config.num_attention_heads)
    walked = ModelWalk(
        family=family_name,
        layers=tuple(_layer(config, family, index) for index in range(config.num_hidden_layers)),
        embedding="model.embed_tokens",
        final_norm="model.norm",
        head="lm_head",
        is_tied=_is_tied(model),
        vocab_size=int(config.vocab_size),
        hidden_size=int(config.hidden_size),
        intermediate_size=int(config.intermediate_size),
        num_heads=num_heads,
        num_kv_heads=int(config.num_key_value_heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // num_heads),
        rms_norm_eps=float(config.rms_norm_eps),
        activation=activation,
        activation_field=family.activation_field,
        gain_offset=family.gain_offset,
        embedding_scale=float(config.hidden_size) ** 0.5 if family.scales_embedding else 1.0,
    )
    _check(model, walked)
    return walked


def config_of(model: nn.Module) -> Any:
    """The configuration of a transformers model; `nn.Module` promises none."""
    return cast("Any", model).config


def linear_at(model: nn.Module, path: str) -> nn.Linear:
    """The projection at a path that `walk` gave."""
    module = model.get_submodule(path)
    assert isinstance(module, nn.Linear), f"{path} is a {type(module).__name__}"
    return module


def _family_of(model: nn.Module) -> tuple[str, Family]:
    name = type(model).__name__
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if isinstance(model_type, str) and model_type in FAMILIES:
        for part in ("model", "lm_head"):
            if not isinstance(getattr(model, part, None), nn.Module):
                raise UserError(
                    f"{name} is not a causal language model",
                    found=f"no submodule `{part}`",
                    fix="load it with AutoModelForCausalLM, without a wrapper around it",
                    exit_code=ExitCode.BAD_INPUT,
                )
        return model_type, FAMILIES[model_type]
    raise UserError(
        f"{name} is not a supported architecture",
        found=f"model type {model_type!r}",
        fix=f"use a decoder of one of the families {', '.join(FAMILIES)}, unwrapped",
        exit_code=ExitCode.BAD_INPUT,
    )


def _layer(config: object, family: Family, index: int) -> LayerWalk:
    path = f"model.layers.{index}"
    attention, mlp = f"{path}.self_attn", f"{path}.mlp"
    projections = {
        name: f"{attention if name in (*ATTENTION_INPUTS, 'o_proj') else mlp}.{name}" for name in PROJECTIONS
    }
    return LayerWalk(
        path=path,
        mlp=mlp,
        projections=projections,
        attention_norm=f"{path}.input_layernorm",
        mlp_norm=f"{path}.{family.mlp_norm}",
        after_attention_norm=_below(path, family.after_attention_norm),
        after_mlp_norm=_below(path, family.after_mlp_norm),
        query_norm=f"{attention}.q_norm" if family.has_query_key_norms else None,
        key_norm=f"{attention}.k_norm" if family.has_query_key_norms else None,
        sub_norms={projections[name]: f"{path}.{norm}" for name, norm in family.sub_norms.items()},
        sliding_window=_sliding_window(config, index),
    )


def _below(path: str, name: str | None) -> str | None:
    return None if name is None else f"{path}.{name}"


def _sliding_window(config: object, index: int) -> int | None:
    """Some families name the kind of every layer, others give one window to all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[index] != "sliding_attention":
        return None
    window = getattr(config, "sliding_window", None)
    return None if window is None else int(window)


def _is_tied(model: nn.Module) -> bool:
    return model.get_submodule("lm_head").weight is model.get_submodule("model.embed_tokens").weight


def _check(model: nn.Module, walked: ModelWalk) -> None:
    """Hold the model against its family: a path that is not there, or a projection of a foreign kind, is an
    error.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, expected in _expected(walked):
        found = modules.get(path)
        if not isinstance(found, expected):
            raise UserError(
                f"{type(model).__name__} is not built like a {walked.family} model: {path}",
                found="nothing" if found is None else type(found).__name__,
                fix=f"it must be an {expected.__name__}; merge adapters and load without other quantisation",
                exit_code=ExitCode.BAD_INPUT,
            )


def _expected(walked: ModelWalk) -> Iterator[tuple[str, type[nn.Module]]]:
    yield walked.embedding, nn.Embedding
    yield walked.head, nn.Linear
    yield walked.final_norm, nn.Module
    for layer in walked.layers:
        for path in layer.projections.values():
            yield path, nn.Linear
        norms = (
            layer.attention_norm,
            layer.mlp_norm,
            layer.after_attention_norm,
            layer.after_mlp_norm,
            layer.query_norm,
            layer.key_norm,
            *layer.sub_norms.values(),
        )
        for norm in norms:
            if norm is not None:
                yield norm, nn.Module
