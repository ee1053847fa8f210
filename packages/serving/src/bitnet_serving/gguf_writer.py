"""Write a GGUF file (version 3, little-endian, alignment 32): one tensor in memory at a time.

    "GGUF" │ version │ number of tensors │ number of keys │ keys and values │ names, shapes, types, offsets │
    padding │ the data of each tensor, padded to 32 bytes

Keys, tensors and their order are the caller's, nothing else goes in, so equal calls make equal bytes. A file
appears under its name when all of it is on disk.
"""

import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet_serving.formats import GGUF_FORMATS, BlockFormat
from bitnet_serving.gguf_values import (
    MAGIC,
    MOST_DIMENSIONS,
    MOST_NAME_BYTES,
    VERSION,
    MetaValue,
    ValueKind,
    padded,
)
from durable import UserError, publish_file


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorToWrite:
    """A tensor whose data is made when its turn comes."""

    name: str
    format: str
    """A name of `formats.GGUF_FORMATS`."""
    shape: tuple[int, ...]
    """Row-major; one to four sizes."""
    produce: Callable[[], Tensor]
    """Its data: `num_bytes` values of uint8."""

    @property
    def block_format(self) -> BlockFormat:
        return GGUF_FORMATS[self.format]

    @property
    def num_bytes(self) -> int:
        return self.block_format.bytes_of_shape(self.shape)


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, MetaValue],
    tensors: Sequence[TensorToWrite],
    *,
    replace: bool = False,
) -> None:
    """Write all of a file or nothing. What a format cannot hold is refused before anything is written."""
    header = _header(metadata, tensors)
    num_bytes = len(header) + sum(padded(tensor.num_bytes) for tensor in tensors)
    with (
        publish_file(path, replace=replace, bytes_needed=num_bytes) as temporary,
        temporary.open("wb") as file,
    ):
        file.write(header)
        for tensor in tensors:
            # In an expression: a name would keep the data until the next tensor has its own.
            file.write(_checked(tensor, tensor.produce()))
            file.write(bytes(padded(tensor.num_bytes) - tensor.num_bytes))


def _checked(tensor: TensorToWrite, data: Tensor) -> memoryview:
    assert data.dtype == torch.uint8, (tensor.name, data.dtype)
    assert data.numel() == tensor.num_bytes, (tensor.name, data.shape)
    return data.detach().contiguous().view(-1).numpy().data


def _header(metadata: Mapping[str, MetaValue], tensors: Sequence[TensorToWrite]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key, key), *_value(key, value)]
    names = [tensor.name for tensor in tensors]
    assert len(set(names)) == len(names), "a tensor is written twice"
    parts += _tensor_entries(tensors)
    header = b"".join(parts)
    return header + bytes(padded(len(header)) - len(header))


def _tensor_entries(tensors: Sequence[TensorToWrite]) -> Iterator[bytes]:
    offset = 0
    for tensor in tensors:
        assert 1 <= len(tensor.shape) <= MOST_DIMENSIONS, (tensor.name, tensor.shape)
        assert min(tensor.shape) > 0, (tensor.name, tensor.shape)
        tensor.block_format.require_holds(tensor.name, tensor.shape)
        if len(tensor.name.encode()) > MOST_NAME_BYTES:
            raise UserError(
                f"{tensor.name}: engines read names of at most {MOST_NAME_BYTES} bytes",
                fix="give it a shorter name",
            )
        type_id = tensor.block_format.type_id
        assert type_id is not None
        yield _text(tensor.name, tensor.name)
        # The file names the fastest dimension first.
        yield struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        yield struct.pack("<IQ", type_id, offset)
        offset += padded(tensor.num_bytes)


def _value(key: str, value: MetaValue) -> Iterator[bytes]:
    """Kind and value: whole numbers are uint32, in lists int32; other numbers are fp32."""
    if isinstance(value, list):
        kind = _kind(key, value[0] if value else None)
        if any(_kind(key, each) != kind for each in value):
            raise _cannot_say(key, "a list of several kinds of values")
        if kind == ValueKind.UINT32:
            kind = ValueKind.INT32
        yield struct.pack("<IIQ", ValueKind.ARRAY, kind, len(value))
        yield _values(key, kind, value)
    else:
        kind = _kind(key, value)
        yield struct.pack("<I", kind)
        yield _values(key, kind, [value])


def _kind(key: str, value: object) -> ValueKind:
    match value:
        case bool():
            return ValueKind.BOOL
        case int():
            return ValueKind.UINT32
        case float():
            return ValueKind.FLOAT32
        case str():
            return ValueKind.STRING
        case None:
            raise _cannot_say(key, "an empty list")
        case _:
            raise _cannot_say(key, type(value).__name__)


def _values(key: str, kind: ValueKind, values: Sequence[object]) -> bytes:
    if kind == ValueKind.STRING:
        return b"".join(_text(key, str(value)) for value in values)
    try:
        data = struct.pack(f"<{len(values)}{kind.letter}", *values)
    except (struct.error, OverflowError):
        raise _cannot_say(key, f"a number outside {kind.name.lower()}") from None
    if kind == ValueKind.FLOAT32 and not all(math.isfinite(value) for value in values):  # type: ignore[arg-type]
        raise _cannot_say(key, "a number that is not finite")
    return data


def _text(key: str, text: str) -> bytes:
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise _cannot_say(key, "half a surrogate pair") from None
    return struct.pack("<Q", len(data)) + data


def _cannot_say(key: str, found: str) -> UserError:
    return UserError(
        f"{key}: a GGUF file cannot say this", found=found, fix="leave the key out or mend its value"
    )
