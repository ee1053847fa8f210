"""Read what a safetensors file says about its tensors, and nothing else: names, dtypes, shapes, sizes.

    8 bytes: header length N, little-endian │ N bytes of JSON │ the data

Nothing of the data is read, and nothing that a damaged or hostile header claims is believed before it has
been compared with the file's size.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from durable import ExitCode, UserError

MOST_HEADER_BYTES = 100_000_000
"""The format's own limit."""
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
}
MODEL_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as its header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)


def read_checkpoint_header(checkpoint_dir: Path) -> list[StoredTensor]:
    """Every tensor of the model in a checkpoint directory, over all its shards, by name."""
    if not checkpoint_dir.is_dir():
        raise UserError(f"{checkpoint_dir}: no such directory", fix="name a checkpoint directory")
    files = sorted(path for path in checkpoint_dir.iterdir() if MODEL_FILE.fullmatch(path.name))
    if not files:
        raise UserError(
            f"{checkpoint_dir}: no model.safetensors here",
            found=", ".join(sorted(path.name for path in checkpoint_dir.iterdir())[:5])
            or "an empty directory",
            fix="name a checkpoint directory",
        )
    tensors = {tensor.name: tensor for path in files for tensor in read_header(path)}
    return [tensors[name] for name in sorted(tensors)]


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one file. Raises when header and file do not fit together."""
    file_size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if file_size < 8 or not 2 <= header_size <= min(MOST_HEADER_BYTES, file_size - 8):
            raise _damaged(path, f"a header of {header_size} bytes in a file of {file_size}")
        header = file.read(header_size)
    try:
        entries: dict[str, Any] = _object(json.loads(header))
        entries.pop("__metadata__", None)
        tensors = [_stored_tensor(name, entry) for name, entry in entries.items()]
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__} in the header") from None
    if 8 + header_size + end != file_size:
        raise _damaged(path, f"{file_size} bytes where the header needs {8 + header_size + end}")
    return tensors


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{type(value).__name__} where an object belongs")
    return value


def _stored_tensor(name: str, entry: dict[str, Any]) -> StoredTensor:
    shape = tuple(int(size) for size in entry["shape"])
    start, end = entry["data_offsets"]
    tensor = StoredTensor(name, str(entry["dtype"]), shape, int(end) - int(start))
    if (
        min((start, end - start, *shape)) < 0
        or tensor.num_values * BITS[tensor.dtype] != tensor.num_bytes * 8
    ):
        raise ValueError(f"{name} has {tensor.num_bytes} bytes for {tensor.dtype} {shape}")
    return tensor


def _damaged(path: Path, found: str) -> UserError:
    return UserError(
        f"{path}: damaged or not safetensors",
        found=found,
        fix="copy or save it again",
        exit_code=ExitCode.BAD_DATA,
    )
