"""The largest micro-batch that fits, an optimizer step's samples staying what they are.

    samples of a step on this rank = batch_size × gradient_accumulation_steps      any divisor is a cut

On a GPU cuts are tried, a forward and backward with everything that a step keeps, until the largest that
fits is found. On a CPU running out of memory ends the process, so one sample is measured and the rest is
arithmetic. Nothing of it is left behind: tokens are made up, no weight is updated, random numbers go on where
they were. What was found lies in the run directory and holds for the rest of the run, since another cut has
other roundings.
"""

import copy
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitnet_arch.bitlinear import bitlinears
from data_handler import Batch
from durable import ExitCode, UserError, publish_file
from wrinklefree.config import RunConfig
from wrinklefree.objectives.manager import ObjectiveManager
from wrinklefree.teachers.base import Teacher
from wrinklefree.training.ranks import Ranks
from wrinklefree.training.student import Models

logger = logging.getLogger(__name__)
FILE = "batch_size.json"
HEADROOM = 1.5
"""What is kept for the backward pass times this is taken for the whole: the rest is working memory."""
OPTIMIZER_BYTES = 8
"""Of a parameter: AdamW's two moments in fp32, the most that any of our optimizers keeps."""


def with_fitting_batch(
    config: RunConfig, directory: Path, models: Models, manager: ObjectiveManager, ranks: Ranks
) -> RunConfig:
    """The configuration with the micro-batch that was found, in an earlier life or now."""
    training = config.training
    if not training.auto_batch_size:
        return config
    samples = training.batch_size * training.gradient_accumulation_steps
    found = ranks.shared(_read(directory / FILE, samples) if ranks.is_first else None)
    if found is None:
        # One answer: ranks that cut their samples differently would read some twice and miss others.
        found = ranks.shared(_search(config, models, manager, samples))
        if ranks.is_first:
            with publish_file(directory / FILE, replace=True) as path:
                path.write_text(json.dumps({"samples": samples, "batch_size": found}) + "\n")
    cut = replace(training, batch_size=found, gradient_accumulation_steps=samples // found)
    changed = copy.copy(config)
    changed.training = cut
    return changed


def largest_fitting(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The largest of these rising sizes that fits, by bisection; UserError (exit code 2) when none does."""
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        if fits(sizes[middle]):
            low = middle + 1
        else:
            high = middle
    if low == 0:
        raise UserError(
            "training.auto_batch_size: not even one sample fits this device's memory",
            fix="lower training.max_seq_length, or choose a smaller model",
            exit_code=ExitCode.BAD_INPUT,
        )
    return sizes[low - 1]


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


@dataclass(frozen=True, slots=True)
class Trial:
    """One micro-batch's forward and backward, as training does it."""

    config: RunConfig
    models: Models
    manager: ObjectiveManager
    device: torch.device

    def fits(self, size: int) -> bool:
        """Whether every rank gets through it."""
        fitted = torch.tensor(1, device=self.device)
        try:
            # What the optimizer will keep is not there yet.
            reserved = torch.empty(self.kept_bytes, dtype=torch.uint8, device=self.device)
            self.run(size)
            del reserved
        except torch.OutOfMemoryError:
            fitted.zero_()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(fitted, op=dist.ReduceOp.MIN)
        return bool(fitted)

    def run(self, size: int) -> None:
        student, teacher = self.models.student, self.models.teacher
        if teacher is not None:
            teacher = teacher.rehearsing()
        batch = _made_up(size, self.config.training.max_seq_length, self.device)
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.training.precision == "bf16"
        )
        with _unchanged(student), _all_weighed(self.manager):
            with autocast:
                counts = self.manager.counts(batch)
                output = self.manager.step(student, teacher, batch, counts)
            output.loss.backward()

    def bytes_of_a_sample(self) -> int:
        """Kept for the backward pass, of one sample: what is saved beyond the model's own tensors."""
        own = {tensor.untyped_storage().data_ptr() for tensor in self.models.student.parameters()}
        seen: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            self.run(1)
        return sum(seen.values())

    @property
    def kept_bytes(self) -> int:
        parameters = [each for each in self.models.student.parameters() if each.requires_grad]
        return sum(each.numel() for each in parameters) * OPTIMIZER_BYTES


def _search(config: RunConfig, models: Models, manager: ObjectiveManager, samples: int) -> int:
    together: list[nn.Module | Teacher] = [models.student]
    if models.teacher is not None:
        together.append(models.teacher)
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        for model in together:
            model.to(device)
        found = largest_fitting(divisors(samples), Trial(config, models, manager, device).fits)
        for model in together:
            model.to("cpu")
        how = f"tried on {torch.cuda.get_device_name(device)}"
    else:
        trial = Trial(config, models, manager, torch.device("cpu"))
        each, free = int(trial.bytes_of_a_sample() * HEADROOM), available_memory()
        gradients = trial.kept_bytes // 2
        found = largest_fitting(
            divisors(samples), lambda size: trial.kept_bytes + gradients + size * each <= free
        )
        how = f"about {each / 2**20:.1f} MiB a sample, measured on one, and {free / 2**20:.0f} MiB are free"
    logger.info(
        "auto_batch_size: %d × %d micro-batches = %d samples a step; %s",
        found,
        samples // found,
        samples,
        how,
    )
    return found


def available_memory() -> int:
    """Bytes that this process may still take: its part of what the system says, and its container allows."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
        free = min(free, int(most) - int(used.read_text()))
    return max(0, free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def _all_weighed(manager: ObjectiveManager) -> Iterator[None]:
    """Each objective is computed, as in the heaviest phase that a curriculum may have."""
    weights = dict(manager.weights)
    manager.set_weights(dict.fromkeys(weights, 1.0))
    try:
        yield
    finally:
        manager.set_weights(weights)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Random numbers, dials, mode and gradients are afterwards what they were."""
    was_training = model.training
    layers = list(bitlinears(model))
    dials = [(layer.quant_amount, layer.activation_amount, layer.subln_amount) for layer in layers]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            model.train()
            for layer in layers:  # between 0 and 1 a layer keeps most
                layer.quant_amount = layer.activation_amount = layer.subln_amount = 0.5
            yield
        finally:
            for layer, (quant, activation, subln) in zip(layers, dials, strict=True):
                layer.quant_amount, layer.activation_amount = quant, activation
                layer.subln_amount = subln
            model.train(was_training)
            model.zero_grad(set_to_none=True)


def _made_up(size: int, length: int, device: torch.device) -> Batch:
    """Samples of one document each, of the first tokens of the vocabulary."""
    places = torch.arange(length, device=device).expand(size, length).contiguous()
    tokens = places % 16
    first = torch.zeros(size, dtype=torch.int64, device=device)
    return Batch(
        input_ids=tokens,
        labels=tokens,
        position_ids=places,
        document_ids=torch.zeros_like(places),
        source_id=first,
        sample_id=first,
    )


def _read(path: Path, samples: int) -> int | None:
    """What an earlier life found, when it still makes the samples of a step."""
    try:
        content = json.loads(path.read_text())
        size = content["batch_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return size if isinstance(size, int) and size >= 1 and content["samples"] == samples else None
