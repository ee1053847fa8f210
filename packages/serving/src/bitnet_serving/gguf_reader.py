"""Read a GGUF file without believing it: metadata at once, the data of a tensor when it is asked for.

Every count, length, offset and shape is compared with the size of the file before anything is made from it.
What is read this way is a file that an engine would take: keys and tensors once, tensors one after the other.

    file = read_gguf(path)
    file.metadata["general.architecture"]
    codes, scales = decode_ternary("tq2_0", file.data("blk.0.attn_q.weight"), 576, 768)
"""

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bitnet_serving.formats import FORMAT_OF_TYPE, BlockFormat, GGMLType
from bitnet_serving.gguf_values import (
    ALIGNMENT,
    MAGIC,
    MOST_DIMENSIONS,
    MOST_NAME_BYTES,
    VERSION,
    MetaValue,
    ValueKind,
    padded,
)
from durable import ExitCode, UserError

if TYPE_CHECKING:
    from torch import Tensor

MOST_HEADER_BYTES = 100_000_000
"""Of everything before the data. The largest vocabularies take 15 MB."""
MOST_VALUES = 2_000_000
"""Of all metadata; as objects they take ten times their bytes. A large vocabulary needs 1.3 million."""
MOST_KEYS = 10_000
MOST_TENSORS = 65_536
"""The largest models have some thousands, with an expert to a tensor some ten thousands."""
MOST_KEY_BYTES = 65_535
MOST_ALIGNMENT = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFTensor:
    """Where a tensor lies and what it is."""

    name: str
    block_format: BlockFormat
    shape: tuple[int, ...]
    """Row-major, as torch has it."""
    offset: int
    """From the beginning of the file."""
    num_bytes: int

    @property
    def type_id(self) -> GGMLType:
        assert self.block_format.type_id is not None
        return self.block_format.type_id


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """What a GGUF file says, in its order."""

    path: Path
    metadata: Mapping[str, MetaValue]
    kinds: Mapping[str, str]
    """Key → `uint32`, `string`, `array of int32`, …"""
    tensors: Mapping[str, GGUFTensor]

    def data(self, name: str) -> "Tensor":
        """The bytes of a tensor, uint8, mapped from the file: nothing is read before it is used."""
        import torch

        tensor = self.tensors[name]
        end = tensor.offset + tensor.num_bytes
        if self.path.stat().st_size < end:
            raise _damaged(self.path, f"{name} ends at byte {end}: the file was cut since it was opened")
        return torch.from_file(str(self.path), shared=False, size=end, dtype=torch.uint8)[tensor.offset :]


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Read and check everything but the data; UserError with exit code 4 for what is damaged."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file", fix="name a GGUF file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise _damaged(path, "an empty file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            return _read(_Cursor(path, view))


class _Cursor:
    """A place in the header that cannot leave it."""

    def __init__(self, path: Path, view: memoryview) -> None:
        self.path = path
        self.place = 0
        self.file_size = len(view)
        self._view = view
        self._end = min(len(view), MOST_HEADER_BYTES)
        self._values_left = MOST_VALUES

    def take(self, num_bytes: int) -> bytes:
        if num_bytes > self._end - self.place:
            limit = "" if self._end == self.file_size else f" of at most {MOST_HEADER_BYTES:,}"
            raise _damaged(
                self.path, f"{num_bytes:,} bytes announced, {self._end - self.place:,} left{limit}"
            )
        begin, self.place = self.place, self.place + num_bytes
        return bytes(self._view[begin : self.place])

    def number(self, letter: str) -> int:
        layout = struct.Struct(f"<{letter}")
        (value,) = layout.unpack(self.take(layout.size))
        return int(value)

    def text(self, what: str, longest: int = MOST_HEADER_BYTES) -> str:
        length = self.number("Q")
        if length > longest:
            raise _damaged(self.path, f"{what} of {length:,} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise _damaged(self.path, f"{what} that is not UTF-8") from None

    def _texts(self, key: str, count: int) -> list[MetaValue]:
        """`text`, a million times: what it costs to call adds up to seconds."""
        texts: list[MetaValue] = []
        length_at = struct.Struct("<Q").unpack_from
        place, end, view = self.place, self._end, self._view
        try:
            for _ in range(count):
                begin = place + 8
                place = begin + length_at(view, place)[0]
                if place > end:
                    break
                texts.append(str(view[begin:place], "utf-8"))
        except struct.error:
            pass
        except UnicodeDecodeError:
            raise _damaged(self.path, f"{key} that is not UTF-8") from None
        if len(texts) != count:
            raise _damaged(self.path, f"{key}: {count:,} texts announced, {len(texts):,} there")
        self.place = place
        return texts

    def count(self, what: str, most: int) -> int:
        number = self.number("Q")
        if number > most:
            raise _damaged(self.path, f"{number:,} {what} announced, of at most {most:,}")
        return number

    def kind(self) -> ValueKind:
        number = self.number("I")
        try:
            return ValueKind(number)
        except ValueError:
            raise _damaged(self.path, f"a value of the unknown kind {number}") from None

    def values(self, key: str, kind: ValueKind, count: int) -> list[MetaValue]:
        """So many values of one kind."""
        self._values_left -= count
        if self._values_left < 0:
            raise _damaged(self.path, f"more than {MOST_VALUES:,} metadata values, with those of {key}")
        if kind == ValueKind.ARRAY:
            raise _damaged(self.path, f"{key}: an array of arrays")
        if kind == ValueKind.STRING:
            return self._texts(key, count)
        data = self.take(count * struct.calcsize(kind.letter))
        if kind == ValueKind.BOOL and data.strip(b"\0\1"):
            raise _damaged(self.path, f"{key}: a truth value other than 0 and 1")
        return list(struct.unpack(f"<{count}{kind.letter}", data))


def _read(cursor: _Cursor) -> GGUFFile:
    path = cursor.path
    if (magic := cursor.take(4)) != MAGIC:
        raise _damaged(path, f"{magic!r} at its beginning")
    if (version := cursor.number("I")) != VERSION:
        raise _damaged(path, f"version {version} where {VERSION} is read")
    num_tensors, num_keys = cursor.count("tensors", MOST_TENSORS), cursor.count("keys", MOST_KEYS)
    metadata: dict[str, MetaValue] = {}
    kinds: dict[str, str] = {}
    for _ in range(num_keys):
        key = cursor.text("a key", MOST_KEY_BYTES)
        if key in metadata:
            raise _damaged(path, f"{key} twice")
        metadata[key], kinds[key] = _read_value(cursor, key)
    entries = [_read_entry(cursor) for _ in range(num_tensors)]
    return GGUFFile(path, metadata, kinds, _placed(cursor, entries, _alignment(path, metadata, kinds)))


def _read_value(cursor: _Cursor, key: str) -> tuple[MetaValue, str]:
    kind = cursor.kind()
    if kind == ValueKind.STRING:
        return cursor.text(key), "string"
    if kind != ValueKind.ARRAY:
        return cursor.values(key, kind, 1)[0], kind.name.lower()
    kind = cursor.kind()
    # A list of one kind, which its element type is too wide to say.
    values: MetaValue = cursor.values(key, kind, cursor.number("Q"))  # type: ignore[assignment]
    return values, f"array of {kind.name.lower()}"


def _read_entry(cursor: _Cursor) -> tuple[str, BlockFormat, tuple[int, ...], int]:
    """Name, format, shape and offset of a tensor."""
    path, name = cursor.path, cursor.text("a tensor name", MOST_NAME_BYTES)
    num_dimensions = cursor.number("I")
    if num_dimensions > MOST_DIMENSIONS:
        raise _damaged(path, f"{name} with {num_dimensions} dimensions")
    shape = tuple(reversed([cursor.number("Q") for _ in range(num_dimensions)]))
    type_id = cursor.number("I")
    block_format = FORMAT_OF_TYPE.get(type_id)  # type: ignore[call-overload]
    if block_format is None:
        raise _damaged(path, f"{name} of the unknown type {type_id}")
    if 0 in shape or math.prod(shape) >= 2**63 or not block_format.holds_shape(shape):
        raise _damaged(path, f"{name}: {'×'.join(map(str, shape))} values as {block_format.name}")
    return name, block_format, shape, cursor.number("Q")


def _placed(
    cursor: _Cursor, entries: list[tuple[str, BlockFormat, tuple[int, ...], int]], alignment: int
) -> dict[str, GGUFTensor]:
    """Tensors one after the other, as engines demand, and all of them inside the file."""
    begin, end = padded(cursor.place, alignment), 0
    tensors: dict[str, GGUFTensor] = {}
    for name, block_format, shape, offset in entries:
        if name in tensors:
            raise _damaged(cursor.path, f"{name} twice")
        if offset != end:
            raise _damaged(cursor.path, f"{name} at offset {offset:,} where {end:,} is next")
        num_bytes = block_format.bytes_of_shape(shape)
        if begin + offset + num_bytes > cursor.file_size:
            raise _damaged(
                cursor.path,
                f"{name} ends at byte {begin + offset + num_bytes:,} in a file of {cursor.file_size:,}",
            )
        tensors[name] = GGUFTensor(
            name=name, block_format=block_format, shape=shape, offset=begin + offset, num_bytes=num_bytes
        )
        end = padded(offset + num_bytes, alignment)
    return tensors


def _alignment(path: Path, metadata: Mapping[str, MetaValue], kinds: Mapping[str, str]) -> int:
    value = metadata.get("general.alignment", ALIGNMENT)
    if kinds.get("general.alignment", "uint32") != "uint32" or not isinstance(value, int):
        raise _damaged(path, f"general.alignment as {kinds['general.alignment']}")
    if value.bit_count() != 1 or value > MOST_ALIGNMENT:
        raise _damaged(path, f"an alignment of {value}")
    return value


def _damaged(path: Path, found: str) -> UserError:
    return UserError(
        f"{path}: damaged, or not a GGUF file",
        found=found,
        fix="copy or export it again",
        exit_code=ExitCode.BAD_DATA,
    )
