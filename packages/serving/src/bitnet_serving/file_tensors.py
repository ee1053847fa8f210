"""The tensors of a file, made from those of a checkpoint when their turn comes.

    codes, scale ──► rows of q and k in the engine's order ──► wider, if blocks ask for it ──► bytes

A ternary weight is codes and a scale whatever the type: f16 holds ±scale, and q8_0 blocks hold the codes with
the scale for their step, so that no type rounds anything but the scale. Where that would lose too much (bf16,
tiny scales), or on request, blocks hold the codes alone and a tensor `scale` of one fp32 stands beside them,
which upstream multiplies the product by. It costs the engine one more operation for every matrix.

Shapes: weight and codes [N, K]; of q and k N = heads · head_dim.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitnet_serving.architectures import PROJECTION_ROLES, Architecture, Place, places
from bitnet_serving.checkpoint_source import CheckpointSource
from bitnet_serving.encoding import encode_dense, encode_ternary, stored_scale
from bitnet_serving.formats import GGUF_FORMATS, TERNARY_FORMATS
from bitnet_serving.gguf_writer import TensorToWrite
from bitnet_serving.model_metadata import rope_factors
from bitnet_serving.padding import AXES, Padding
from durable import ExitCode, UserError

LARGEST_SCALE_ERROR = 2.0**-11
"""Relative: what rounding to fp16 does to a normal number."""
ROWS_AT_ONCE = 4096


class ScaleLostError(Exception):
    """The blocks of a type would round a scale by more than `LARGEST_SCALE_ERROR`."""


@dataclass(slots=True, kw_only=True)
class FileTensors:
    """Every tensor of the file."""

    source: CheckpointSource
    architecture: Architecture
    padding: Padding
    body: str
    dense_body: str
    """Of projections that are not ternary."""
    embeddings: str
    head: str
    vocab_size: int
    without: int | None
    """A row of embedding and head to leave out."""
    scale_tensors: bool
    merge_lrc: bool
    scales: dict[str, float] = field(default_factory=dict, init=False)
    """Module → its scale, once its weight was made."""
    largest_scale_error: float = field(default=0.0, init=False)

    def listed(self) -> Iterator[TensorToWrite]:
        """In the order of the file."""
        for place in places(self.source.walked, self.source.stored.keys()):
            yield self._tensor(place)
            if self.scale_tensors and self._has_scale(place):
                yield TensorToWrite(
                    name=place.with_leaf("scale"), format="f32", shape=(1,), produce=self._scale(place)
                )
        factors = rope_factors(self.source.config, self.source.walked.head_dim)
        if factors is not None:
            yield TensorToWrite(
                name="rope_freqs.weight",
                format="f32",
                shape=(len(factors),),
                produce=lambda: encode_dense("f32", torch.tensor(factors)),
            )

    def format_of(self, place: Place) -> str:
        """The type of a tensor; gains and biases are fp32, as engines want them."""
        if place.role == "token_embd":
            return self.embeddings
        if place.role == "output":
            return self.head
        if place.role not in PROJECTION_ROLES.values() or place.kind == "bias":
            return "f32"
        return self.body if self._is_ternary(place) or self.body not in TERNARY_FORMATS else self.dense_body

    def _tensor(self, place: Place) -> TensorToWrite:
        form = self.format_of(place)
        produce: Callable[[], Tensor]
        shape: tuple[int, ...]
        if place.role in ("token_embd", "output"):
            shape = (self.vocab_size, self.padding.padded.hidden)
            produce = lambda: self._table(place, form)  # noqa: E731
        else:
            stored = self.source.shape(place.name)
            axes = AXES[place.role][: len(stored)]
            shape = tuple(
                size if axis == "as it is" else self.padding.padded.width(axis)
                for size, axis in zip(stored, axes, strict=True)
            )
            make = self._ternary if self._has_scale(place) else self._dense
            produce = lambda: make(place, form)  # noqa: E731
        return TensorToWrite(name=place.gguf_name, format=form, shape=shape, produce=produce)

    def _is_ternary(self, place: Place) -> bool:
        return place.kind == "weight" and place.module in self.source.record.ternary

    def _has_scale(self, place: Place) -> bool:
        """It is ternary in the file too, and not merged with its correction."""
        return self._is_ternary(place) and not (self.merge_lrc and place.module in self.source.record.lrc)

    def _has_codes(self, place: Place) -> bool:
        """Ternary, and not merged with a correction."""
        return self._is_ternary(place) and not (self.merge_lrc and place.module in self.source.record.lrc)

    def _ternary(self, place: Place, form: str) -> Tensor:
        codes, tensor_scale = self.source.ternary(place.module)
        codes = self.padding.widen(place.role, self.in_order(place, codes))
        scale = float(tensor_scale) * self.padding.factor(place.role)
        if self.scale_tensors:
            self.scales[place.module] = scale
            return encode_codes(form, codes, 1.0)
        error = abs(kept_scale(form, scale) / scale - 1)
        if error > LARGEST_SCALE_ERROR:
            raise ScaleLostError(place.gguf_name)
        self.largest_scale_error = max(self.largest_scale_error, error)
        return encode_codes(form, codes, scale)

    def _scale(self, place: Place) -> Callable[[], Tensor]:
        return lambda: encode_dense("f32", torch.tensor([self.scales[place.module]]))

    def _dense(self, place: Place, form: str) -> Tensor:
        """Gains, biases, and projections as plain numbers."""
        if self._is_ternary(place):
            values = self._merged(place.module)
        else:
            values = self.source.dense(place.name).float()
        if place.role.endswith("_norm"):
            values = values + self.source.walked.gain_offset
        return encode_dense(form, self.padding.apply(place.role, self.in_order(place, values), place.kind))

    def _merged(self, module: str) -> Tensor:
        """A ternary weight and its low-rank correction as one matrix."""
        values = self.source.ternary(module).value()
        up, down = (self.source.dense(f"{module}.lrc_{name}").float() for name in "UV")
        return values.addmm_(up, down.t())

    def _table(self, place: Place, form: str) -> Tensor:
        """Embedding or head, a few thousand rows at a time."""
        values = self.source.dense(place.name)
        if self.without is not None:
            assert self.without == len(values) - 1, "only the last row can go without others moving up"
            values = values[: self.without]
        data = torch.empty(
            GGUF_FORMATS[form].num_bytes(len(values), self.padding.padded.hidden), dtype=torch.uint8
        )
        data_NB = data.view(len(values), -1)
        for begin in range(0, len(values), ROWS_AT_ONCE):
            rows = self.padding.apply(place.role, values[begin : begin + ROWS_AT_ONCE].float())
            data_NB[begin : begin + len(rows)] = encode_dense(form, rows).view(len(rows), -1)
        return data

    def in_order(self, place: Place, values: Tensor) -> Tensor:
        """transformers rotates channel i with i + head_dim/2, `llama` 2i with 2i + 1."""
        if not self.architecture.permutes or place.role not in ("attn_q", "attn_k"):
            return values
        halves = values.unflatten(0, (-1, 2, self.source.walked.head_dim // 2))
        pairs: Tensor = halves.transpose(1, 2).flatten(0, 2)
        return pairs


def kept_scale(form: str, scale: float) -> float:
    """The scale that a tensor of this type keeps of a ternary weight's."""
    match form:
        case "f32":
            return float(torch.tensor(scale, dtype=torch.float32))
        case "bf16":
            return float(torch.tensor(scale, dtype=torch.bfloat16))
        case _:
            return stored_scale(form, scale)


def encode_codes(form: str, codes: Tensor, scale: float) -> Tensor:
    """Ternary codes and their scale as the data of a tensor of any type."""
    if form in TERNARY_FORMATS:
        return encode_ternary(form, codes, scale)
    if form != "q8_0":
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[form]
        return encode_dense(form, codes.to(dtype).mul_(kept_scale(form, scale)))
    blocks = torch.empty(GGUF_FORMATS[form].num_bytes(*codes.shape), dtype=torch.uint8).view(-1, 34)
    blocks[:, :2] = torch.tensor([scale], dtype=torch.float16).view(torch.uint8)
    blocks[:, 2:] = codes.reshape(-1, 32).view(torch.uint8)
    return blocks.view(-1)


def require_i2_s(architecture: Architecture) -> None:
    """Microsoft's engine reads its own type in graphs that it has."""
    if architecture.name not in ("bitnet", "bitnet-b1.58", "llama", "qwen3", "gemma3"):
        raise UserError(
            f"--type i2_s: Microsoft's engine has no `{architecture.name}`",
            fix="export as tq2_0, which upstream llama.cpp reads",
            exit_code=ExitCode.BAD_INPUT,
        )
