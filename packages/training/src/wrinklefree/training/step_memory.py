"""What an optimizer step takes, before anything of it is allocated.

    peak = weights + optimizer state + max( forward and backward of a micro-batch, with gradients held
                                            gradients + what the optimizer makes on the way )

The training step itself runs on tensors without data (`LiveTensors`) and is counted: forward and backward of
the whole model, the optimizer of the same model with one and with two layers, since it repeats itself.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from bitnet_arch import (
    BlockDiffusion,
    ConversionConfig,
    convert_to_bitnet,
    set_block_diffusion,
    set_quant_amount,
    set_subln_amount,
)
from data_handler import Batch
from wrinklefree.config import RunConfig
from wrinklefree.objectives.diffusion import ON_MASKED_TOKENS
from wrinklefree.objectives.manager import ObjectiveManager
from wrinklefree.optimizers.build import build_optimizer
from wrinklefree.teachers.base import Teacher
from wrinklefree.teachers.local import LocalTeacher
from wrinklefree.teachers.opening import teacher_dtype
from wrinklefree.teachers.sparse import UndecidedTeacher
from wrinklefree.training.exporting import choose_subln
from wrinklefree.training.live_tensors import LiveTensors

HALF_WAY = 0.5
"""Of λ and μ: between 0 and 1 a layer keeps most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMemory:
    """Bytes on one device."""

    weights: int
    teacher: int
    optimizer: int
    working: int
    """Gradients, activations and what operations make on the way, at the peak."""

    @property
    def peak(self) -> int:
        return self.weights + self.teacher + self.optimizer + self.working


def estimated_memory(
    config: RunConfig,
    manager: ObjectiveManager,
    student: PretrainedConfig,
    teacher: PretrainedConfig | None,
    device: torch.device,
) -> StepMemory:
    """`student` and `teacher` describe the models before conversion; one that runs elsewhere is none."""
    counter = LiveTensors(fake=True)
    model, weights = _fake_student(config, student, counter, device)
    taught: Teacher | None = None
    teacher_bytes = 0
    if teacher is not None:
        taught_by = skeleton(teacher, teacher_dtype(config)).eval().requires_grad_(False)
        counter.made_fake(taught_by, device)
        teacher_bytes = counter.watch([*taught_by.parameters(), *taught_by.buffers()])
        taught = LocalTeacher(taught_by)
    elif manager.needs().teacher:
        taught = UndecidedTeacher(student.vocab_size - 1, config.training.teacher.top_k)
    batch = made_up_batch(config.training.batch_size, config.training.max_seq_length)
    before = counter.now
    with counter:
        num = min(2, config.training.gradient_accumulation_steps)
        for _ in range(num):
            forward_and_backward(config, manager, model, taught, batch, device, counter.fake_like)
    gradients = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    state, transient = _optimizer_bytes(config, student, device)
    return StepMemory(
        weights=weights,
        teacher=teacher_bytes,
        optimizer=state,
        working=max(counter.peak - before, gradients + transient),
    )


def forward_and_backward(
    config: RunConfig,
    manager: ObjectiveManager,
    model: nn.Module,
    teacher: Teacher | None,
    batch: Batch,
    device: torch.device,
    inputs: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """One micro-batch as training does it; `inputs` makes what the model reads of the batch's ids."""
    # Places, labels and documents stay real: what is masked and what has a loss is looked at on the way.
    batch = replace(batch, input_ids=inputs(batch.input_ids))
    counts = manager.counts(batch)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.training.precision == "bf16"):
        output = manager.step(model, teacher, batch, counts)
    output.loss.backward()


def made_up_batch(size: int, length: int) -> Batch:
    """Samples of two documents each, which is what packing makes."""
    places = torch.arange(length).expand(size, length).contiguous()
    first = torch.zeros(size, dtype=torch.int64)
    return Batch(
        input_ids=places % 16,
        labels=places % 16,
        position_ids=places,
        document_ids=(places >= length // 2).long(),
        source_id=first,
        sample_id=first,
    )


def _fake_student(
    config: RunConfig, described: PretrainedConfig, counter: LiveTensors, device: torch.device
) -> tuple[PreTrainedModel, int]:
    """The converted student, and the bytes of its weights."""
    model = skeleton(described)
    wanted = config.training.auto_convert
    # Gains that would be calibrated have the same shape as those that are 1.
    subln = choose_subln(model, wanted.subln)
    conversion = ConversionConfig(exclude=tuple(wanted.exclude_layers), subln=subln)
    convert_to_bitnet(model, conversion)
    training = config.training
    if any(name in training.objectives for name in ON_MASKED_TOKENS):
        # Which token is [MASK] makes no difference but for one row.
        last = int(described.vocab_size) - 1
        set_block_diffusion(
            model, BlockDiffusion(mask_token_id=last, block_size=training.diffusion.block_size)
        )
    for ramp, set_amount in (
        (training.lambda_warmup, set_quant_amount),
        (training.subln_warmup, set_subln_amount),
    ):
        set_amount(model, HALF_WAY if ramp.steps(config.max_steps) else 1.0)
    counter.made_fake(model, device)
    return model.train(), counter.watch([*model.parameters(), *model.buffers()])


def skeleton(described: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model whose tensors all show the same single one: conversion can look at it, memory is not taken."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(described, dtype=dtype)
    one = torch.ones((), dtype=dtype)
    shown: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                shape = parameter.shape
                module._parameters[name] = shown.setdefault(
                    id(parameter), nn.Parameter(one.expand(shape), parameter.requires_grad)
                )
    model.tie_weights()
    return model


def _optimizer_bytes(config: RunConfig, described: PretrainedConfig, device: torch.device) -> tuple[int, int]:
    """What the optimizer keeps, and what it makes on the way beyond that and the gradients."""
    num_layers = int(described.num_hidden_layers)
    kept, transient = [], 0
    sizes = sorted({1, min(2, num_layers)})
    for size in sizes:
        counter = LiveTensors(fake=True)
        model, _ = _fake_student(config, _with_layers(described, size), counter, device)
        optimizer = build_optimizer(model, config.training.optimizer)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.grad = counter.fake_like(parameter.detach())
        counter.watch(parameter.grad for parameter in parameters if parameter.grad is not None)
        before = counter.now
        with counter:
            optimizer.step()
            optimizer.step()
        kept.append(counter.now - before)
        transient = max(transient, counter.peak - counter.now)
    each = kept[-1] - kept[0]
    return kept[0] + (num_layers - 1) * each, transient


def _with_layers(described: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    shorter = copy.deepcopy(described)
    shorter.num_hidden_layers = num_layers
    if getattr(shorter, "layer_types", None) is not None:
        shorter.layer_types = shorter.layer_types[:num_layers]
    return shorter
