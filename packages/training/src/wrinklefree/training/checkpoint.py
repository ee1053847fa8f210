"""A checkpoint is everything that the next step depends on, published as one directory.

    model.safetensors  config.json  bitnet.json  [tokenizer]     what `load_bitnet` opens
    train_state.safetensors                                     optimizer state, by parameter name
    train_state.json                                            step, configuration, and the parts of the run
    manifest.json                                               sha256 and size of each, the step, versions

Parts are whatever the run keeps beside model and optimizer: data, ramps, influence, clipping, counters. Each
gives a `state_dict` of what json holds. safetensors and json only; nothing is ever unpickled.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitnet_arch.checkpoint import Tokenizer, checkpoint_files
from durable import ExitCode, UserError, publish
from wrinklefree.lightning.module import Progress
from wrinklefree.optimizers.state import split_state
from wrinklefree.training.student import Models
from wrinklefree.training.uploading import Uploader

FORMAT_VERSION = 1
STATE_JSON = "train_state.json"
STATE_TENSORS = "train_state.safetensors"


class Part(Protocol):
    """Something whose state goes into every checkpoint."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> object: ...


@runtime_checkable
class TensorPart(Protocol):
    """A part that keeps tensors, too."""

    def state_tensors(self) -> dict[str, Tensor]: ...

    def load_state_tensors(self, tensors: dict[str, Tensor], /) -> object: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """The state of a run between two optimizer steps, but for the model."""

    step: int
    config: dict[str, Any]
    parts: dict[str, dict[str, Any]]
    optimizer: dict[str, Any]
    """What json holds of the optimizer."""
    tensors: dict[str, Tensor]
    """The rest of it."""
    part_tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Part → its tensors."""

    def restore(self, parts: Mapping[str, Part]) -> None:
        """Bring every part that the checkpoint knows to where it was."""
        for name, part in parts.items():
            if name in self.parts:
                part.load_state_dict(self.parts[name])
            if isinstance(part, TensorPart):
                part.load_state_tensors(self.part_tensors.get(name, {}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Saver:
    """Writes a checkpoint of the run as it is now."""

    config: dict[str, Any]
    """What a resume is compared with."""
    stage: str
    models: Models
    optimizer: torch.optim.Optimizer
    progress: Progress
    parts: Mapping[str, Part]
    uploader: Uploader | None = None

    def __call__(self, target: Path) -> None:
        tensors, numbers = split_state(self.optimizer)
        state = TrainState(
            step=self.progress.step,
            config=self.config,
            parts={name: part.state_dict() for name, part in self.parts.items()},
            optimizer=numbers,
            tensors=tensors,
            part_tensors={
                name: part.state_tensors()
                for name, part in self.parts.items()
                if isinstance(part, TensorPart)
            },
        )
        write_checkpoint(
            target, self.models.student, state, tokenizer=self.models.tokenizer, stage=self.stage
        )
        if self.uploader is not None:
            self.uploader.submit(target)

    @property
    def waiting(self) -> Collection[Path]:
        """Checkpoints that are not copied yet, and may not be removed."""
        return self.uploader.pending if self.uploader is not None else ()


def write_checkpoint(
    target: Path, model: nn.Module, state: TrainState, *, tokenizer: Tokenizer | None, stage: str
) -> None:
    """Publish a checkpoint; UserError (exit code 5) when it cannot be written, and what was there stays."""
    files = checkpoint_files(model)
    content = {
        "format_version": FORMAT_VERSION,
        "step": state.step,
        "config": state.config,
        "parts": state.parts,
        "optimizer": state.optimizer,
    }
    text = json.dumps(content, allow_nan=False)
    _set_aside_foreign(target)
    tensors = _joined(state)
    num_bytes = files.num_bytes + sum(tensor.nbytes for tensor in tensors.values())
    metadata = {"step": state.step, "stage": stage}
    with publish(target, replace=True, metadata=metadata, bytes_needed=num_bytes) as directory:
        files.write(directory)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / STATE_TENSORS)
        (directory / STATE_JSON).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(directory))


def read_train_state(checkpoint: Path) -> TrainState:
    """The state in a checkpoint whose manifest was verified; UserError (exit code 4) for another format."""
    path = checkpoint / STATE_JSON
    if not path.is_file():
        raise UserError(
            f"{checkpoint}: a model, but not a checkpoint of a run",
            found=f"no {STATE_JSON}",
            fix="start from it with model.pretrained_name, or name a checkpoint of `train`",
            exit_code=ExitCode.BAD_DATA,
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path}: was written in format {version}",
                found=f"this release reads {FORMAT_VERSION}",
                fix="resume with the release that wrote it",
                exit_code=ExitCode.BAD_DATA,
            )
        tensors, part_tensors = _separated(load_file(checkpoint / STATE_TENSORS))
        return TrainState(
            step=content["step"],
            config=content["config"],
            parts=content["parts"],
            optimizer=content["optimizer"],
            tensors=tensors,
            part_tensors=part_tensors,
        )
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"{path}: is damaged or foreign",
            found=f"{type(error).__name__}: {error}",
            fix="use another checkpoint",
            exit_code=ExitCode.BAD_DATA,
        ) from None


def _joined(state: TrainState) -> dict[str, Tensor]:
    """All tensors of one file; names of parameters have no slash in front."""
    parts = {
        f"/{part}/{name}": tensor
        for part, tensors in state.part_tensors.items()
        for name, tensor in tensors.items()
    }
    return state.tensors | parts


def _separated(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """What `_joined` put together."""
    parts: dict[str, dict[str, Tensor]] = {}
    for path in [path for path in tensors if path.startswith("/")]:
        _, part, name = path.split("/", 2)
        parts.setdefault(part, {})[name] = tensors.pop(path)
    return tensors, parts


def _set_aside_foreign(target: Path) -> None:
    """A directory of that name which no `publish` wrote is kept under another name, never written over."""
    if target.is_dir() and any(target.iterdir()) and not (target / "manifest.json").is_file():
        number = 0
        while (aside := target.with_name(f"foreign-{target.name}-{number}")).exists():
            number += 1
        target.rename(aside)
