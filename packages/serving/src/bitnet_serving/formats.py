"""The formats in which an engine's file stores a tensor: blocks of consecutive weights of a row.

A format holds a matrix only when the row's width is a multiple of its block. An engine drops a tail in
silence (gguf-quantised files with such tails load and speak nonsense), so every place here refuses it.

    format   block   bytes per block     bits per weight   what a block is
    tq2_0    256     66                  2.0625            codes at 2 bits, fp16 scale
    tq1_0    256     54                  1.6875            codes at 5 to a byte, fp16 scale
    q2_0     64      18                  2.25              fp16 scale, codes at 2 bits
    i2_s     128     32 (+ 32 a tensor)  2                 codes at 2 bits, one fp32 scale after all of them
    q8_0     32      34                  8.5               fp16 scale, int8

Shapes are row-major, as torch has them: a matrix has N rows of K columns.
"""

import math
from dataclasses import dataclass
from enum import IntEnum

from durable import UserError


class GGMLType(IntEnum):
    """What a GGUF file calls the types of its tensors. 36 is Microsoft's; upstream has removed it."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    I2_S = 36
    Q2_0 = 42


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """A way to store a matrix in an engine's file."""

    name: str
    type_id: GGMLType | None
    """None where no GGUF file has it."""
    block_columns: int
    block_bytes: int
    block_rows: int = 1
    tensor_bytes: int = 0
    """What a tensor has beside its blocks."""

    def holds(self, rows: int, columns: int) -> bool:
        return columns % self.block_columns == 0 and rows % self.block_rows == 0

    def num_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix that it holds."""
        assert self.holds(rows, columns)
        return rows * columns // (self.block_columns * self.block_rows) * self.block_bytes + self.tensor_bytes

    def holds_shape(self, shape: tuple[int, ...]) -> bool:
        """The same for a tensor of any rank: its rows lie one after the other."""
        # Where scales follow the weights of a tensor, an engine looks for them after one matrix.
        return self.holds(*_as_matrix(shape)) and (self.tensor_bytes == 0 or len(shape) == 2)

    def bytes_of_shape(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor that it holds."""
        assert self.holds_shape(shape)
        return self.num_bytes(*_as_matrix(shape))

    def require_holds(self, tensor_name: str, shape: tuple[int, ...]) -> None:
        """Refuse a tensor that the blocks would cut short; the error says which types hold it."""
        if self.holds_shape(shape):
            return
        others = [other.name for other in GGUF_FORMATS.values() if other.holds_shape(shape)]
        raise UserError(
            f"{tensor_name}: {self.name} cannot hold it, its rows must be a multiple of {self.block_columns}",
            found=f"{'×'.join(map(str, shape)) or 'one number'}",
            fix=f"pad its width, or store it as {', '.join(others)}",
        )


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def _formats(*formats: BlockFormat) -> dict[str, BlockFormat]:
    return {each.name: each for each in formats}


TERNARY_FORMATS = _formats(
    BlockFormat(name="tq2_0", type_id=GGMLType.TQ2_0, block_columns=256, block_bytes=66),
    BlockFormat(name="tq1_0", type_id=GGMLType.TQ1_0, block_columns=256, block_bytes=54),
    BlockFormat(name="q2_0", type_id=GGMLType.Q2_0, block_columns=64, block_bytes=18),
    BlockFormat(name="i2_s", type_id=GGMLType.I2_S, block_columns=128, block_bytes=32, tensor_bytes=32),
)
"""Codes in {-1, 0, +1} and a scale, to the bit."""
DENSE_FORMATS = _formats(
    BlockFormat(name="f32", type_id=GGMLType.F32, block_columns=1, block_bytes=4),
    BlockFormat(name="f16", type_id=GGMLType.F16, block_columns=1, block_bytes=2),
    BlockFormat(name="bf16", type_id=GGMLType.BF16, block_columns=1, block_bytes=2),
    BlockFormat(name="q8_0", type_id=GGMLType.Q8_0, block_columns=32, block_bytes=34),
)
"""Any values, rounded."""
GGUF_FORMATS = TERNARY_FORMATS | DENSE_FORMATS
"""What this package writes and reads, by the names that `--type` has."""
PACKED = BlockFormat(
    name="packed", type_id=None, block_columns=1, block_rows=4, block_bytes=1, tensor_bytes=4
)
"""transformers' own: codes at two bits, four rows to a byte, and a scale beside them."""

_OTHERS = (
    # name, columns and bytes of a block: what a reader meets in files of other writers, and only measures
    (GGMLType.Q4_0, 32, 18),
    (GGMLType.Q4_1, 32, 20),
    (GGMLType.Q5_0, 32, 22),
    (GGMLType.Q5_1, 32, 24),
    (GGMLType.Q2_K, 256, 84),
    (GGMLType.Q3_K, 256, 110),
    (GGMLType.Q4_K, 256, 144),
    (GGMLType.Q5_K, 256, 176),
    (GGMLType.Q6_K, 256, 210),
    (GGMLType.I8, 1, 1),
    (GGMLType.I16, 1, 2),
    (GGMLType.I32, 1, 4),
    (GGMLType.I64, 1, 8),
    (GGMLType.F64, 1, 8),
)
FORMAT_OF_TYPE = {each.type_id: each for each in GGUF_FORMATS.values() if each.type_id is not None} | {
    type_id: BlockFormat(name=type_id.name.lower(), type_id=type_id, block_columns=columns, block_bytes=size)
    for type_id, columns, size in _OTHERS
}
"""Every type that a file may have, by its number."""
