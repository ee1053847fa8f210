"""Widen a model so that a block format holds its rows, without changing what it computes.

Blocks run along the columns of a projection, which are the hidden width, the width of all heads together, or
the MLP's. Channels that are zero everywhere change a product by nothing, but three places feel them:

* An RMSNorm averages over its width. With d real channels of D the mean falls by d/D, so gains are multiplied
  by √(d/D) and ε by d/D. A file has one ε, which is the hidden norms'. A norm over another width w of W (a
  sub-norm; the query and key norms, where w = W) gets an input that is √((d/D)·(W/w)) times as large: that is
  the same norm again, and the factor goes into the scale of the one projection in front (v, up, q and k).
* A head whose queries are zero attends evenly and so returns the mean of its group's values. Zero columns of
  `o` drop it, but a sub-norm would count it. Hence the ways to add heads:

      zero queries in each group     q q q 0 | q q q 0               without a sub-norm
      zero groups                    q q q | q q q | 0 0 0           values are zero as well
      copies of keys and values      q | q | q | q | q | q | 0 | 0   to make groups smaller first

* Gemma multiplies its embedding by √D instead of √d: the embedding takes √(d/D), and where the head is the
  same tensor, the gain of the last norm takes √(D/d), which cancels the factor that it has as a norm.

head_dim never changes, so rotations and the softmax's scale do not either. All of it is exact but for the
rounding of gains and scales. What has codes is quantised first: zeros would lower the mean that is its scale.

Shapes: a projection has rows × columns; d → D hidden, and likewise for heads and the MLP.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd, lcm, prod, sqrt
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bitnet_arch.walk import FAMILIES

Axis = Literal["hidden", "ffn", "query", "kv", "as it is"]
Kind = Literal["weight", "bias", "lora_a", "lora_b"]

AXES: dict[str, tuple[Axis, ...]] = {
    "token_embd": ("as it is", "hidden"),
    "output": ("as it is", "hidden"),
    "attn_q": ("query", "hidden"),
    "attn_k": ("kv", "hidden"),
    "attn_v": ("kv", "hidden"),
    "attn_output": ("hidden", "query"),
    "ffn_gate": ("ffn", "hidden"),
    "ffn_up": ("ffn", "hidden"),
    "ffn_down": ("hidden", "ffn"),
    "attn_norm": ("hidden",),
    "ffn_norm": ("hidden",),
    "post_attention_norm": ("hidden",),
    "post_ffw_norm": ("hidden",),
    "output_norm": ("hidden",),
    "attn_sub_norm": ("query",),
    "ffn_sub_norm": ("ffn",),
    "attn_q_norm": ("as it is",),
    "attn_k_norm": ("as it is",),
}
"""Role → what each dimension of its weight runs over; the first is the output, and the bias's."""
INPUT_OF_SUB_NORM = {"attn_v": "attn_sub_norm", "ffn_up": "ffn_sub_norm"}
"""A factor on these reaches the norm as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the widths of a model hang on."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int
    tied: bool
    """The head is the embedding."""
    sub_norms: bool = False
    """Norms in front of `o` and `down`. Engines that have them want heads·head_dim to be the hidden width."""
    query_key_norms: bool = False
    scales_embedding: bool = False
    """The engine multiplies the embedding by the root of the hidden width."""

    @classmethod
    def of_config(cls, config: Mapping[str, Any], *, sub_norms: bool) -> "ModelShape":
        """From what `config.json` says."""
        family = FAMILIES[config["model_type"]]
        heads = int(config["num_attention_heads"])
        return cls(
            hidden=int(config["hidden_size"]),
            ffn=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            layers=int(config["num_hidden_layers"]),
            vocab=int(config["vocab_size"]),
            tied=bool(config["tie_word_embeddings"]),
            sub_norms=sub_norms,
            query_key_norms=family.has_query_key_norms,
            scales_embedding=family.scales_embedding,
        )

    @property
    def group(self) -> int:
        """Query heads that share their keys and values."""
        return self.heads // self.kv_heads

    def width(self, axis: Axis) -> int:
        """How long a dimension is that runs over `axis`."""
        match axis:
            case "hidden":
                return self.hidden
            case "ffn":
                return self.ffn
            case "query":
                return self.heads * self.head_dim
            case "kv":
                return self.kv_heads * self.head_dim
            case "as it is":
                raise AssertionError("this dimension is not the shape's to say")

    @property
    def num_ternary(self) -> int:
        """Weights of all projections."""
        projections = (axes for role, axes in AXES.items() if len(axes) == 2 and "as it is" not in axes)
        return self.layers * sum(prod(self.width(axis) for axis in axes) for axes in projections)

    @property
    def num_embedding(self) -> int:
        """Weights of embedding and head."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    def __str__(self) -> str:
        return f"hidden {self.hidden}, heads {self.heads}/{self.kv_heads}, ffn {self.ffn}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """How the tensors of a model of one shape become those of a wider one."""

    shape: ModelShape
    padded: ModelShape
    kv_copies: int = 1
    """How often each head of keys and values stands there."""
    num_bytes: int
    """Projections, embedding and head after padding."""
    unpadded_bytes: int
    """The same at the same bits per weight, if they would fit."""

    @property
    def is_needed(self) -> bool:
        return self.shape != self.padded

    @property
    def eps_factor(self) -> float:
        """Of the one ε that all norms of a file share."""
        return self.shape.hidden / self.padded.hidden

    def factor(self, role: str) -> float:
        """What the values of a role are multiplied by: gains, a ternary scale, a bias, `lora_b`."""
        if role == "output_norm" and self.shape.scales_embedding and self.shape.tied:
            return 1.0
        if role.endswith("_norm"):
            return sqrt(1 / self._growth(role))
        if role in INPUT_OF_SUB_NORM and self.shape.sub_norms:
            return sqrt(self.eps_factor * self._growth(INPUT_OF_SUB_NORM[role]))
        if role in {"attn_q", "attn_k"} and self.shape.query_key_norms:
            return sqrt(self.eps_factor)
        if role == "token_embd" and self.shape.scales_embedding:
            return sqrt(self.eps_factor)
        return 1.0

    def widen(self, role: str, values: Tensor, kind: Kind = "weight") -> Tensor:
        """The same values in their new places, with zeros around them. The dtype stays."""
        axes = AXES[role]
        match kind:
            case "bias":
                axes = axes[:1]
            case "lora_a":
                axes = ("as it is", axes[1])
            case "lora_b":
                axes = (axes[0], "as it is")
        for dim, axis in enumerate(axes):
            values = self._widen(values, dim, axis)
        return values

    def apply(self, role: str, values: Tensor, kind: Kind = "weight") -> Tensor:
        """Widened and multiplied. Codes are only widened, and their scale takes `factor(role)`."""
        assert values.is_floating_point(), f"{role}: codes have no room for a factor"
        widened = self.widen(role, values, kind)
        factor = 1.0 if kind == "lora_a" else self.factor(role)
        return widened if factor == 1.0 else (widened.double() * factor).to(values.dtype)

    def pad_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The `config.json` of the wider model."""
        padded = self.padded
        return dict(config) | {
            "hidden_size": padded.hidden,
            "intermediate_size": padded.ffn,
            "num_attention_heads": padded.heads,
            "num_key_value_heads": padded.kv_heads,
            "head_dim": padded.head_dim,
            "rms_norm_eps": config["rms_norm_eps"] * self.eps_factor,
        }

    def __str__(self) -> str:
        if not self.is_needed:
            return "no padding"
        more = self.num_bytes / self.unpadded_bytes - 1
        cache = self.padded.kv_heads / self.shape.kv_heads
        return (
            f"padded exactly: {self.shape} → {self.padded}; {self.num_bytes / 1e6:,.1f} MB where "
            f"{self.unpadded_bytes / 1e6:,.1f} MB would do (+{100 * more:.0f} %), KV cache × {cache:.2f}"
        )

    def _growth(self, norm: str) -> float:
        """How much wider a norm becomes."""
        (axis,) = AXES[norm]
        return 1.0 if axis == "as it is" else self.padded.width(axis) / self.shape.width(axis)

    def _widen(self, values: Tensor, dim: int, axis: Axis) -> Tensor:
        if axis == "as it is" or (self.shape.width(axis) == self.padded.width(axis) and axis != "query"):
            return values
        assert values.shape[dim] == self.shape.width(axis), f"{tuple(values.shape)} does not fit {self.shape}"
        places = self._places(axis)
        if axis == "kv":
            values = torch.repeat_interleave(
                values.unflatten(dim, (-1, self.shape.head_dim)), self.kv_copies, dim
            ).flatten(dim, dim + 1)
        if torch.equal(places, torch.arange(self.padded.width(axis))):
            return values
        size = (*values.shape[:dim], self.padded.width(axis), *values.shape[dim + 1 :])
        widened = values.new_zeros(size)
        if torch.equal(places, torch.arange(len(places))):
            widened.narrow(dim, 0, len(places)).copy_(values)  # several times as fast as by index
            return widened
        return widened.index_copy_(dim, places, values)

    def _places(self, axis: Axis) -> Tensor:
        """Where each row of the narrow tensor goes; rows of `kv` after they were copied."""
        if axis != "query":
            copies = self.kv_copies if axis == "kv" else 1
            return torch.arange(self.shape.width(axis) * copies)
        head = torch.arange(self.shape.heads)
        kv_head, member = head // self.shape.group, head % self.shape.group
        group = kv_head * self.kv_copies + member // self.padded.group
        place = group * self.padded.group + member % self.padded.group
        return (place[:, None] * self.shape.head_dim + torch.arange(self.shape.head_dim)).flatten()


class HeadLayout(NamedTuple):
    """A number of heads that holds the model's."""

    heads: int
    kv_heads: int
    kv_copies: int


def plan_padding(
    shape: ModelShape,
    block: int,
    *,
    bytes_per_weight: float,
    embedding_block: int = 1,
    embedding_bytes_per_weight: float = 2.0,
) -> Padding:
    """The exact padding of fewest bytes that makes every row a multiple of its block."""
    hidden = _round_up(shape.hidden, lcm(block, embedding_block))
    candidates: list[Padding] = []
    for layout in _head_layouts(shape, hidden, lcm(block, embedding_block) if shape.sub_norms else block):
        padded = replace(
            shape,
            hidden=layout.heads * shape.head_dim if shape.sub_norms else hidden,
            ffn=_round_up(shape.ffn, block),
            heads=layout.heads,
            kv_heads=layout.kv_heads,
        )
        num_bytes, unpadded_bytes = (
            round(each.num_ternary * bytes_per_weight + each.num_embedding * embedding_bytes_per_weight)
            for each in (padded, shape)
        )
        candidates.append(
            Padding(
                shape=shape,
                padded=padded,
                kv_copies=layout.kv_copies,
                num_bytes=num_bytes,
                unpadded_bytes=unpadded_bytes,
            )
        )
    return min(candidates, key=lambda each: (each.num_bytes, each.padded.kv_heads, each.padded.heads))


def _head_layouts(shape: ModelShape, hidden: int, block: int) -> Iterator[HeadLayout]:
    """For every size of a group the fewest heads that fill blocks, and the hidden width where they must."""
    unit = block // gcd(block, shape.head_dim)
    fewest = -(-hidden // shape.head_dim) if shape.sub_norms else shape.heads
    for group in range(1, max(shape.group, -(-fewest // shape.kv_heads)) + unit):
        if shape.sub_norms and shape.group % group:
            continue
        copies = -(-shape.group // group)
        kv_heads = max(shape.kv_heads * copies, -(-fewest // group))
        while kv_heads * group % unit:
            kv_heads += 1
        yield HeadLayout(kv_heads * group, kv_heads, copies)


def _round_up(width: int, block: int) -> int:
    return -(-width // block) * block
