"""What a ternary checkpoint weighs: by part as it is stored, and in each format that an engine reads.

From the headers alone: no tensor is loaded. What the formats are and which widths they hold: `formats`.

Shapes: a projection has N rows of K columns.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bitnet_serving.formats import PACKED, TERNARY_FORMATS, BlockFormat
from bitnet_serving.json_objects import read_json_object
from bitnet_serving.safetensors_header import StoredTensor, read_checkpoint_header
from durable import ExitCode, UserError

DENSE_BYTES = 2
"""Bytes per parameter of the dense model to compare with, and of everything that stays dense: bf16."""
PARTS = ("projections", "dense projections", "scales", "embeddings", "head", "norms", "biases", "other")
FORMATS = (PACKED, *TERNARY_FORMATS.values())
"""What projections are weighed in."""


@dataclass(slots=True)
class Part:
    """Tensors of one kind, added up."""

    num_tensors: int = 0
    num_parameters: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Projection:
    """A matrix with ternary weights, or one that would be ternary after a conversion."""

    name: str
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a checkpoint weighs."""

    checkpoint_dir: Path
    projections: list[Projection] = field(default_factory=list)
    parts: dict[str, Part] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        return sum(part.num_parameters for name, part in self.parts.items() if name != "scales")

    @property
    def stored_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts.values())

    @property
    def dense_bytes(self) -> int:
        """Everything in bf16."""
        return self.num_parameters * DENSE_BYTES

    def misfits(self, block_format: BlockFormat) -> list[Projection]:
        """The projections that a format cannot hold."""
        return [each for each in self.projections if not block_format.holds(each.rows, each.columns)]

    def bytes_in(self, block_format: BlockFormat) -> int | None:
        """The model with its projections in a format and the rest in bf16; None when one does not fit."""
        if self.misfits(block_format):
            return None
        ternary = sum(block_format.num_bytes(each.rows, each.columns) for each in self.projections)
        num_ternary = sum(each.rows * each.columns for each in self.projections)
        return ternary + (self.num_parameters - num_ternary) * DENSE_BYTES

    def __str__(self) -> str:
        return "\n".join([*self._part_lines(), "", *self._format_lines()])

    def _part_lines(self) -> Iterable[str]:
        yield f"  {'part':<18}{'tensors':>8}{'parameters':>14}{'stored':>12}"
        for name, part in self.parts.items():
            counts = f"{part.num_tensors:>8}{part.num_parameters:>14,}"
            yield f"  {name:<18}{counts}{_kilobytes(part.num_bytes):>12}"
        yield f"  {'together':<18}{'':>8}{self.num_parameters:>14,}{_kilobytes(self.stored_bytes):>12}"

    def _format_lines(self) -> Iterable[str]:
        yield f"  {'projections as':<18}{'model':>12}{'of dense':>10}"
        yield f"  {'dense bf16':<18}{_kilobytes(self.dense_bytes):>12}{'100 %':>10}"
        for block_format in FORMATS:
            size = self.bytes_in(block_format)
            if size is None:
                yield f"  {block_format.name:<18}{'-':>12}{'':>10}  {self._why_not(block_format)}"
            else:
                share = f"{size / self.dense_bytes:.0%}".replace("%", " %")
                yield f"  {block_format.name:<18}{_kilobytes(size):>12}{share:>10}"

    def _why_not(self, block_format: BlockFormat) -> str:
        misfits = self.misfits(block_format)
        widths = sorted({each.columns for each in misfits})
        return (
            f"{len(misfits)} of {len(self.projections)} do not fit: blocks of {block_format.block_columns}, "
            f"rows of {', '.join(map(str, widths[:4]))}"
        )


def read_sizes(checkpoint_dir: Path) -> Sizes:
    """Weigh a checkpoint directory of any layout; a dense model as if all its projections became ternary."""
    tensors = read_checkpoint_header(checkpoint_dir)
    ternary = _ternary_modules(checkpoint_dir)
    packed = {
        tensor.name.removesuffix("_scale") for tensor in tensors if tensor.name.endswith(".weight_scale")
    }
    projections: list[Projection] = []
    parts: dict[str, Part] = {name: Part() for name in PARTS}
    for tensor in tensors:
        part_name = _part_of(tensor, ternary)
        rows_per_value = 4 if tensor.name in packed and tensor.dtype == "U8" else 1
        if part_name == "projections":
            rows, columns = tensor.shape
            projections.append(Projection(tensor.name, rows * rows_per_value, columns))
        part = parts[part_name]
        part.num_tensors += 1
        part.num_parameters += tensor.num_values * rows_per_value
        part.num_bytes += tensor.num_bytes
    return Sizes(
        checkpoint_dir, projections, {name: part for name, part in parts.items() if part.num_tensors}
    )


def _part_of(tensor: StoredTensor, ternary: frozenset[str] | None) -> str:
    name, module = tensor.name, tensor.name.rpartition(".")[0]
    if name.endswith(".weight_scale"):
        return "scales"
    if name.endswith("embed_tokens.weight"):
        return "embeddings"
    if name.endswith("lm_head.weight"):
        return "head"
    if name.endswith(".bias"):
        return "biases"
    if name.endswith(".weight") and len(tensor.shape) == 1:
        return "norms"
    if name.endswith(".weight") and len(tensor.shape) == 2 and ".layers." in name:
        return "projections" if ternary is None or module in ternary else "dense projections"
    return "other"


def _ternary_modules(checkpoint_dir: Path) -> frozenset[str] | None:
    """The modules that `bitnet.json` calls ternary; None for a model that was never converted."""
    path = checkpoint_dir / "bitnet.json"
    if not path.exists():
        return None
    modules = read_json_object(path).get("ternary")
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise UserError(
            f"{path}: cannot be read",
            found="no list of ternary modules",
            fix="copy or save it again",
            exit_code=ExitCode.BAD_DATA,
        )
    return frozenset(modules)


def _kilobytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e3:,.1f} kB" if num_bytes < 1e7 else f"{num_bytes / 1e6:,.1f} MB"
