"""Which graph of an engine computes a model, and what the graph calls its tensors.

    architecture     activation  q·k norm  sub-norms  biases        head   order of q and k
    bitnet           SiLU        no        both       none          tied   as it is
    bitnet-b1.58     ReLU²       no        both       none          tied   as it is (Microsoft's engine only)
    llama            SiLU        no        none       any           any    pairs of a rotation side by side
    qwen2            SiLU        no        none       q, k, v       any    as it is
    qwen3            SiLU        yes       none       none          any    as it is
    gemma3           GELU        yes       none       none          tied   as it is; gains + 1

Engines do not check a graph against a model: one with ReLU² in `bitnet` loads, and is wrong in every second
token. So what no row of this table holds is refused, with the setting to change.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from bitnet_arch.walk import ATTENTION_INPUTS, LayerWalk, ModelWalk
from durable import ExitCode, UserError

Kind = Literal["weight", "bias"]

PROJECTION_ROLES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
SUB_NORM_ROLES = {"o_proj": "attn_sub_norm", "down_proj": "ffn_sub_norm"}
SILU = ("silu", "swish")
RELU2 = ("relu2",)
GELU_TANH = ("gelu_pytorch_tanh",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A graph that engines have."""

    name: str
    families: tuple[str, ...]
    activations: tuple[str, ...]
    sub_norms: bool = False
    biases: frozenset[str] = frozenset()
    """Roles that may have one."""
    tied_only: bool = False
    square_attention: bool = False
    """All heads together are as wide as the hidden state."""
    permutes: bool = False
    """Rotates neighbours where transformers rotates halves, so rows of q and k change places."""
    in_upstream: bool = True
    """Upstream llama.cpp has it, and so the engine that exports are checked with."""


LLAMA_LIKE = ("llama", "mistral", "bitnet", "qwen2")
_QKV = frozenset(PROJECTION_ROLES[name] for name in ATTENTION_INPUTS)
ARCHITECTURES = {
    each.name: each
    for each in (
        Architecture(
            name="bitnet",
            families=LLAMA_LIKE,
            activations=SILU,
            sub_norms=True,
            tied_only=True,
            square_attention=True,
        ),
        Architecture(
            name="bitnet-b1.58",
            families=LLAMA_LIKE,
            activations=RELU2,
            sub_norms=True,
            tied_only=True,
            square_attention=True,
            in_upstream=False,
        ),
        Architecture(
            name="llama",
            families=("llama", "mistral"),
            activations=SILU,
            biases=frozenset(PROJECTION_ROLES.values()),
            permutes=True,
        ),
        Architecture(name="qwen2", families=("qwen2",), activations=SILU, biases=_QKV),
        Architecture(name="qwen3", families=("qwen3",), activations=SILU),
        Architecture(name="gemma3", families=("gemma3_text",), activations=GELU_TANH, tied_only=True),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTraits:
    """What decides on an architecture."""

    family: str
    activation: str
    activation_field: str
    is_tied: bool
    attention_width: int
    hidden_size: int
    norms_in: frozenset[str] = frozenset()
    """Projections (q_proj, …) with a norm of their own in front of them."""
    biases: frozenset[str] = frozenset()
    """Roles."""

    @classmethod
    def of(
        cls, walked: ModelWalk, *, normed: Collection[str], tensor_names: Collection[str]
    ) -> "ModelTraits":
        """Of a model; `normed` are the paths of projections with a norm inside or in front of them."""
        return cls(
            family=walked.family,
            activation=walked.activation,
            activation_field=walked.activation_field,
            is_tied=walked.is_tied,
            attention_width=walked.num_heads * walked.head_dim,
            hidden_size=walked.hidden_size,
            norms_in=frozenset(path.rpartition(".")[2] for path in normed),
            biases=frozenset(
                PROJECTION_ROLES[path.rpartition(".")[2]]
                for path in walked.projections
                if f"{path}.bias" in tensor_names
            ),
        )


def choose_architecture(traits: ModelTraits) -> Architecture:
    """The architecture that computes exactly this; UserError with the setting to change where none does."""
    problems: dict[str, tuple[str, str]] = {}
    for each in ARCHITECTURES.values():
        if traits.family in each.families and each.sub_norms == bool(traits.norms_in):
            problem = _misfit(traits, each)
            if problem is None:
                return each
            problems[each.name] = problem
    if problems:
        # Of two that differ in the activation only, the one whose activation it is.
        name, (found, fix) = min(
            problems.items(), key=lambda item: traits.activation not in ARCHITECTURES[item[0]].activations
        )
        raise refused(f"engines' `{name}` cannot compute this {traits.family} model", found, fix)
    raise refused(
        f"no engine computes a {traits.family} model"
        + (" with norms inside its projections" if traits.norms_in else ""),
        ", ".join(sorted(traits.norms_in)) or traits.family,
        "train without SubLN (training.auto_convert.subln=none; convert --subln off), or write "
        "transformers' own format (export hf)",
    )


def _misfit(traits: ModelTraits, architecture: Architecture) -> tuple[str, str] | None:
    """What was found that the architecture does not have, and what to change."""
    without_sub_norms = "train without SubLN (training.auto_convert.subln=none; convert --subln off)"
    if traits.norms_in and traits.norms_in != set(SUB_NORM_ROLES):
        return (
            f"norms in {', '.join(sorted(traits.norms_in))}",
            "norm o and down and nothing else: training.auto_convert.subln=output (convert --subln output)",
        )
    if traits.activation not in architecture.activations:
        return (
            f"{traits.activation_field} {traits.activation}",
            "keep the model's own activation (convert --hidden-act keep)"
            if not traits.norms_in
            else f"use {' or '.join((*SILU[:1], *RELU2))} (convert --hidden-act)",
        )
    if architecture.tied_only and not traits.is_tied:
        return "a head of its own (tie_word_embeddings false)", (
            without_sub_norms if architecture.sub_norms else "tie it to the embedding"
        )
    if architecture.square_attention and traits.attention_width != traits.hidden_size:
        return (
            f"heads of {traits.attention_width} channels together, hidden_size {traits.hidden_size}",
            without_sub_norms,
        )
    if not traits.biases <= architecture.biases:
        biased = ", ".join(sorted(traits.biases - architecture.biases))
        return f"biases on {biased}", without_sub_norms if architecture.sub_norms else "train without them"
    return None


def refused(what: str, found: str, fix: str) -> UserError:
    """For what no engine computes."""
    return UserError(f"export gguf: {what}", found, fix, ExitCode.BAD_INPUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A tensor of the checkpoint and its place in the file."""

    role: str
    """Its name in the file, without the layer."""
    layer: int | None
    name: str
    """In the checkpoint."""
    kind: Kind = "weight"

    @property
    def gguf_name(self) -> str:
        return self.with_leaf(self.kind)

    def with_leaf(self, leaf: str) -> str:
        """What stands beside it in the file, such as its `scale`."""
        return f"{self.role}.{leaf}" if self.layer is None else f"blk.{self.layer}.{self.role}.{leaf}"

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]


def places(walked: ModelWalk, tensor_names: Collection[str]) -> Iterator[Place]:
    """Every tensor that goes into the file, layer by layer."""
    yield Place(role="token_embd", layer=None, name=f"{walked.embedding}.weight")
    for index, layer in enumerate(walked.layers):
        for role, module in _modules(layer):
            for kind in ("weight", "bias"):
                if f"{module}.{kind}" in tensor_names:
                    yield Place(role=role, layer=index, name=f"{module}.{kind}", kind=kind)
    yield Place(role="output_norm", layer=None, name=f"{walked.final_norm}.weight")
    if not walked.is_tied:
        yield Place(role="output", layer=None, name=f"{walked.head}.weight")


def _modules(layer: LayerWalk) -> Iterator[tuple[str, str]]:
    """Roles and module paths. Where a sub-norm is depends on who owns it; names that are not there are
    passed over.
    """
    norms = {
        "attn_norm": layer.attention_norm,
        "attn_q_norm": layer.query_norm,
        "attn_k_norm": layer.key_norm,
        "post_attention_norm": layer.after_attention_norm,
        "ffn_norm": layer.mlp_norm,
        "post_ffw_norm": layer.after_mlp_norm,
    }
    yield from ((role, path) for role, path in norms.items() if path is not None)
    for name, path in layer.projections.items():
        yield PROJECTION_ROLES[name], path
        if name in SUB_NORM_ROLES:
            yield SUB_NORM_ROLES[name], f"{path}.input_norm"
            if path in layer.sub_norms:
                yield SUB_NORM_ROLES[name], layer.sub_norms[path]
