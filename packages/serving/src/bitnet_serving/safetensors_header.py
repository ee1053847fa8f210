"""Read what a safetensors file says about its tensors, and nothing else: names, dtypes, shapes, places.

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

from bitnet_serving.json_objects import read_json_object
from durable import ExitCode, UserError

MOST_HEADER_BYTES = 8_000_000
"""The format allows 100 MB, which as objects may take 2 GB; a file of 50,000 tensors needs 7 MB."""
MOST_DIMENSIONS = 64
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
MODEL_FILE = re.compile(r"model(-(?P<number>\d{1,9})-of-(?P<count>\d{1,9}))?\.safetensors")
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as its header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    path: Path
    """The file that it is in."""
    offset: int
    """Of its data, from the beginning of the file."""

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
    _require_every_shard(checkpoint_dir, files)
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for tensor in read_header(path):
            if tensor.name in tensors:
                raise _damaged(path, f"{tensor.name}, which {tensors[tensor.name].path.name} has too")
            tensors[tensor.name] = tensor
    _require_what_the_index_says(checkpoint_dir / INDEX_NAME, tensors)
    return [tensors[name] for name in sorted(tensors)]


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one file. Raises when header and file do not fit together."""
    if not path.is_file():
        raise UserError(f"{path}: no such file", fix="copy it again", exit_code=ExitCode.BAD_DATA)
    file_size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if file_size < 8 or not 2 <= header_size <= min(MOST_HEADER_BYTES, file_size - 8):
            raise _damaged(path, f"a header of {header_size:,} bytes in a file of {file_size:,}")
        header = file.read(header_size)
    try:
        entries = json.loads(header, object_pairs_hook=_object)
        if not isinstance(entries, dict):
            raise TypeError
        entries.pop("__metadata__", None)
        tensors = [_stored_tensor(path, 8 + header_size, name, entry) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__} in the header") from None
    end = 8 + header_size
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != end:
            raise _damaged(path, f"{tensor.name} at byte {tensor.offset:,} where {end:,} is next")
        end += tensor.num_bytes
    if end != file_size:
        raise _damaged(path, f"{file_size:,} bytes where the header needs {end:,}")
    return tensors


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name twice")
    return content


def _stored_tensor(path: Path, data_begin: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if len(shape) > MOST_DIMENSIONS or any(type(number) is not int for number in (*shape, start, end)):
        raise TypeError(name)
    tensor = StoredTensor(name, dtype, tuple(shape), end - start, path, data_begin + start)
    # The sizes are compared first: the product of a hostile shape may have millions of digits.
    if not 0 <= start <= end < 2**63 or not all(0 <= size < 2**63 for size in shape):
        raise ValueError(name)
    if tensor.num_values * BITS[dtype] != tensor.num_bytes * 8:
        raise ValueError(name)
    return tensor


def _require_every_shard(checkpoint_dir: Path, files: list[Path]) -> None:
    """The names of shards say how many there are."""
    matches = [match for path in files if (match := MODEL_FILE.fullmatch(path.name)) and match["count"]]
    counts = {int(match["count"]) for match in matches}
    if not counts:
        return
    if len(counts) > 1 or len(matches) != len(files):
        raise _damaged(checkpoint_dir, f"files of several models: {files[0].name}, {files[-1].name}")
    numbers = sorted(int(match["number"]) for match in matches)
    missing = next((n for n, found in enumerate(numbers, start=1) if n != found), len(numbers) + 1)
    if len(numbers) != counts.pop() or missing <= len(numbers):
        width, count = len(matches[0]["number"]), matches[0]["count"]
        path = checkpoint_dir / f"model-{missing:0{width}d}-of-{count}.safetensors"
        raise UserError(
            f"{path}: this shard is missing", fix="copy the directory again", exit_code=ExitCode.BAD_DATA
        )


def _require_what_the_index_says(path: Path, tensors: dict[str, StoredTensor]) -> None:
    """An index is not needed to find tensors; one that says something else is of another model."""
    if not path.is_file():
        return
    try:
        places = read_json_object(path)["weight_map"]
        said = {name: places[name] for name in sorted(places)}
    except (KeyError, TypeError) as error:
        raise _damaged(path, f"{type(error).__name__} in the index") from None
    for name in sorted(said.keys() | tensors.keys()):
        found = tensors[name].path.name if name in tensors else "no file"
        if said.get(name) != found:
            raise _damaged(path, f"{name} in {said.get(name)!r}, where {found} has it")


def _damaged(path: Path, found: str) -> UserError:
    return UserError(
        f"{path}: damaged or not safetensors",
        found=found,
        fix="copy or save it again",
        exit_code=ExitCode.BAD_DATA,
    )
