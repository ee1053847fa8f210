"""Read a saved ternary model tensor by tensor: any layout, no pickle, never the whole model.

A checkpoint is one file of tensors, of which one at a time is in memory, and a record that says what they are
(`bitnet_arch.record`). Both layouts and packed weights look alike from here: names and shapes are those of
the model itself. The architecture is built without memory for its parameters, to say which those are.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet_arch.checkpoint import ORIGINALS_NAME, TENSORS_NAME, open_checkpoint
from bitnet_arch.finite import refuse_unusable_tensors
from bitnet_arch.packed import VALUES_PER_ITEM, unpack
from bitnet_arch.quant import TernaryWeight, quantize_weight
from bitnet_arch.rebuild import empty_model, make_ternary, read_config
from bitnet_arch.record import RECORD_NAME, BitnetRecord
from bitnet_arch.walk import ModelWalk, walk
from bitnet_serving.safetensors_header import StoredTensor, read_header
from durable import ExitCode, UserError, newest_complete, read_manifest

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I8": torch.int8,
}
"""What a ternary model may be saved in."""
CHECKPOINTS = "checkpoints"
"""Where a run keeps them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSource:
    """An open checkpoint."""

    directory: Path
    record: BitnetRecord
    config: dict[str, Any]
    """The model's own, also where `config.json` names another class."""
    walked: ModelWalk
    stored: dict[str, StoredTensor]
    """Name in the model → where it is."""
    shapes: dict[str, tuple[int, ...]]
    """Name → shape in the model."""
    provenance: dict[str, str | int]
    """What the directory and its run say about where it comes from."""

    @property
    def normed(self) -> tuple[str, ...]:
        """Projections with a norm inside or in front of them."""
        return (*self.record.subln.inserted, *self.walked.sub_norms)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor as the model has it."""
        return self.shapes[name]

    def dense(self, name: str) -> Tensor:
        """A tensor as it was saved; UserError when it is not finite."""
        tensor = _read(self.stored[name])
        # NaN comes through both ends; one pass, where looking at every value apart takes several.
        if tensor.is_floating_point() and not all(bool(end.isfinite()) for end in tensor.aminmax()):
            refuse_unusable_tensors({name: tensor}, action="export")
        return tensor

    def ternary(self, module: str) -> TernaryWeight:
        """Codes and scale of a ternary projection."""
        name = f"{module}.weight"
        weight = _read(self.stored[name])
        if not self.record.packed:
            codes, scale = quantize_weight(weight)
            if not scale.isfinite():  # a mean over all of them
                refuse_unusable_tensors({name: weight}, action="export")
            return TernaryWeight(codes, scale)
        codes = unpack(weight) if weight.dtype == torch.uint8 else weight.to(torch.int8)
        return TernaryWeight(codes, self.dense(f"{module}.weight_scale").reshape(()).float())


def open_source(checkpoint: Path) -> CheckpointSource:
    """Open a checkpoint, or the newest one of a run. Every byte and every shape is checked."""
    directory, record = open_checkpoint(newest_of_run(checkpoint))
    config = read_config(directory, record)
    model = empty_model(directory, record)
    walked = walk(model)
    walked = replace(walked, is_tied=f"{walked.head}.weight" in record.ties)  # without memory, nothing is
    make_ternary(model, record, directory)
    stored = _stored(directory, record)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in record.ties}
    _compare(directory, expected, stored)
    return CheckpointSource(
        directory=directory,
        record=record,
        config=config,
        walked=walked,
        stored=stored,
        shapes=expected,
        provenance=_provenance(directory),
    )


def newest_of_run(directory: Path) -> Path:
    """The directory itself, unless it is a run with checkpoints: then the newest that verifies."""
    if (directory / RECORD_NAME).exists() or not (directory / CHECKPOINTS).is_dir():
        _refuse_dense(directory)
        return directory
    newest = newest_complete(directory / CHECKPOINTS).or_raise().path
    if newest is None:
        raise UserError(
            f"{directory / CHECKPOINTS}: no checkpoint",
            found="nothing published yet",
            fix="wait until the run has saved one",
            exit_code=ExitCode.BAD_DATA,
        )
    print(f"newest checkpoint: {newest}")
    return newest


def refuse_unfinished(
    directory: Path, record: BitnetRecord, *, allowed: bool, takes_plain_activations: bool = False
) -> None:
    """Whatever runs an export knows neither λ nor μ: UserError below 1, unless that is `allowed`."""
    if allowed:
        return
    for path in record.ternary:
        settings = record.settings_of(path)
        amounts = ("quant_amount", "activation_amount", "subln_amount")
        found = [f"{name} {settings[name]:g}" for name in amounts if settings[name] != 1]
        if not settings["quantizes_activations"]:
            # Types of plain numbers take activations as they are.
            found = found[:1] if takes_plain_activations else ["activations that are not quantised"]
        if found:
            raise UserError(
                f"{directory}: not at full quantisation, which is all that engines compute",
                found=f"{path} with {', '.join(found)}",
                fix="train until λ = μ = 1, or export what it would be there: --at-full-quantisation",
            )


def _refuse_dense(directory: Path) -> None:
    """A model of transformers that nobody converted has more to say than that a file is missing."""
    if (directory / "config.json").is_file() and not (directory / RECORD_NAME).exists():
        raise UserError(
            f"{directory}: a dense model; its weights are not ternary",
            found=f"config.json without {RECORD_NAME}",
            fix=f"convert it first: wrinklefree convert {directory} OUT, and train it, "
            "or it will speak nonsense",
            exit_code=ExitCode.BAD_DATA,
        )


def _stored(directory: Path, record: BitnetRecord) -> dict[str, StoredTensor]:
    """The stock layout renames some tensors, adds some, and keeps beside it what it changes."""
    names, added = (record.stock.names, record.stock.added) if record.stock else ({}, ())
    files = [directory / TENSORS_NAME, directory / ORIGINALS_NAME]
    return {
        names.get(tensor.name, tensor.name) if path.name == TENSORS_NAME else tensor.name: tensor
        for path in files
        if path.name == TENSORS_NAME or path.is_file()
        for tensor in read_header(path)
        if tensor.name not in added
    }


def _compare(
    directory: Path,
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, StoredTensor],
) -> None:
    problems = [
        *(f"{name} is missing" for name in expected if name not in stored),
        *(f"{name} is unexpected" for name in stored if name not in expected),
        *(
            f"{name} is {_text(found)} and must be {_text(expected[name])}"
            for name, tensor in stored.items()
            if name in expected and (found := _shape(tensor, expected[name])) != expected[name]
        ),
    ]
    if problems:
        raise UserError(
            f"{directory}: tensors do not fit config.json and bitnet.json: {problems[0]}"
            + (f" and {len(problems) - 1} more" if len(problems) > 1 else ""),
            fix="copy the directory again; its files belong together",
            exit_code=ExitCode.BAD_DATA,
        )


def _shape(tensor: StoredTensor, expected: tuple[int, ...]) -> tuple[int, ...]:
    """Packed weights have four rows in one, and their scale is stored as a list of one."""
    if tensor.dtype == "U8" and len(tensor.shape) == 2:
        return (tensor.shape[0] * VALUES_PER_ITEM, tensor.shape[1])
    return () if expected == () and tensor.shape == (1,) else tensor.shape


def _text(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a scalar"


def _read(stored: StoredTensor) -> Tensor:
    """Into memory of its own: pages of a mapped file would count as ours, and stay."""
    data = bytearray(stored.num_bytes)
    try:
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.offset)
            num_read = file.readinto(data)
        if num_read != len(data):
            raise OSError(f"{num_read} bytes of {len(data)}")
        return torch.frombuffer(data, dtype=DTYPES[stored.dtype]).view(stored.shape)
    except (OSError, KeyError) as error:
        raise UserError(
            f"{stored.path}: {stored.name} cannot be read",
            found=stored.dtype if isinstance(error, KeyError) else str(error),
            fix="copy the directory again, or save the model anew",
            exit_code=ExitCode.BAD_DATA,
        ) from None


def _provenance(directory: Path) -> dict[str, str | int]:
    manifest = read_manifest(directory)
    found: dict[str, str | int] = {"model_sha256": manifest.files[TENSORS_NAME].sha256}
    for key in ("step", "stage"):
        if isinstance(value := manifest.metadata.get(key), str | int):
            found[key] = value
    fingerprint = run_fingerprint(directory)
    return found | ({"run_fingerprint": fingerprint} if fingerprint else {})


def run_fingerprint(directory: Path) -> str | None:
    """Of a checkpoint that still lies in its run."""
    if directory.parent.name != CHECKPOINTS:
        return None
    try:
        text = (directory.parent.parent / "fingerprint.json").read_text(encoding="utf-8")
        fingerprint = json.loads(text)["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return fingerprint if isinstance(fingerprint, str) else None
