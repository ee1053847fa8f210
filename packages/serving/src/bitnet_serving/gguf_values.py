"""What writer and reader of GGUF files agree on: kinds of metadata values, limits, alignment."""

from enum import IntEnum

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
MOST_NAME_BYTES = 63
"""Of a tensor's name; engines keep 64 with the end mark."""
MOST_DIMENSIONS = 4

MetaValue = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]


class ValueKind(IntEnum):
    """Kinds of metadata values, by their numbers in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12

    @property
    def letter(self) -> str:
        """As `struct` and `memoryview.cast` call it."""
        return "BbHhIif?  Qqd"[self]


def padded(num_bytes: int, alignment: int = ALIGNMENT) -> int:
    """The next multiple of the alignment."""
    return -(-num_bytes // alignment) * alignment
