"""`wrinklefree train --dry-run`: what a run would take, without taking it."""

import logging
import time
from dataclasses import replace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from wrinklefree.config import RunConfig
from wrinklefree.config.schema import TeacherBackend
from wrinklefree.objectives import create_objective_manager
from wrinklefree.objectives.manager import ObjectiveManager
from wrinklefree.optimizers.build import build_optimizer
from wrinklefree.pretrained import are_weights_here, described_by
from wrinklefree.teachers.opening import teacher_name
from wrinklefree.teachers.sparse import UndecidedTeacher
from wrinklefree.terminal import clock, megabytes, table
from wrinklefree.training.batch_size import available_memory
from wrinklefree.training.memory import memory_in_use
from wrinklefree.training.ranks import num_ranks
from wrinklefree.training.step_memory import (
    StepMemory,
    estimated_memory,
    forward_and_backward,
    made_up_batch,
)
from wrinklefree.training.student import build_models, count_parameters

MEASURED_STEPS = 3
MEASURED_TOKENS = 2048
"""At most so many in a step that is measured; the rest is arithmetic."""


def dry_run(config: RunConfig) -> None:
    """Print parameters, tokens, steps, memory of a device, and seconds of a step."""
    logging.getLogger("wrinklefree").setLevel(logging.WARNING)
    training = config.training
    manager = create_objective_manager(training.objectives, diffusion=training.diffusion, seed=config.seed)
    student = described_by(config.model.pretrained_name)
    runs_here = manager.needs().teacher and training.teacher.backend is TeacherBackend.local
    teacher = described_by(teacher_name(config)) if runs_here else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory = estimated_memory(config, manager, student, teacher, device)
    free = _free_bytes(device)
    samples = training.batch_size * training.gradient_accumulation_steps * num_ranks()
    tokens = samples * training.max_seq_length
    print(f"{config.model.name}, {training.stage.value}: nothing was trained, nothing written\n")
    rows = [
        ("parameters", f"{_num_parameters(student):,}"),
        ("steps", f"{config.max_steps:,}"),
        ("tokens", f"{config.max_steps * tokens:,} ({samples:,} × {training.max_seq_length:,} a step)"),
        *_memory_rows(memory, free, device),
    ]
    print(table(rows))
    names = [config.model.pretrained_name, *([teacher_name(config)] if teacher is not None else [])]
    absent = [name for name in names if not are_weights_here(name)]
    if absent:
        print(
            f"\nseconds of a step: not measured, the weights of {absent[0]} are not here (meta device only)"
        )
    elif memory.peak > free:
        print("\nseconds of a step: not measured, it would not fit (meta device only)")
    else:
        _measure(config, manager, tokens // num_ranks(), device)


def _memory_rows(memory: StepMemory, free: int, device: torch.device) -> list[tuple[str, str]]:
    verdict = "fits" if memory.peak <= free else "does NOT fit"
    return [
        ("memory per device", f"{megabytes(memory.peak)}, the most that tensors take at once"),
        ("  weights", megabytes(memory.weights)),
        ("  teacher", megabytes(memory.teacher)),
        ("  optimizer", megabytes(memory.optimizer)),
        ("  gradients, activations", megabytes(memory.working)),
        (f"free on this {device.type}", f"{megabytes(free)}: {verdict}"),
    ]


def _measure(config: RunConfig, manager: ObjectiveManager, tokens: int, device: torch.device) -> None:
    """Print the time of a step, from three small ones."""
    training = config.training
    length = training.max_seq_length
    size = max(1, min(training.batch_size, MEASURED_TOKENS // length))
    batch = made_up_batch(size, length)
    needs, tells_top_k = manager.needs(), not training.teacher.knows_inside
    models = build_models(
        config,
        checkpoint=None,
        needs=replace(needs, teacher_logits=False) if tells_top_k else needs,
        calibration=[batch.input_ids],
    )
    model: nn.Module = models.student
    model.to(device)
    teacher = models.teacher
    if teacher is not None:
        teacher.to(device)
    elif needs.teacher:  # no server is asked here, and no cache filled
        vocab_size = int(described_by(config.model.pretrained_name).vocab_size)
        teacher = UndecidedTeacher(vocab_size - 1, training.teacher.top_k)  # the last may be [MASK]
    optimizer = build_optimizer(model, training.optimizer)
    batch = batch.to(device)
    passes, updates = [], []
    for _ in range(MEASURED_STEPS + 1):  # the first one warms up
        started = _now(device)
        forward_and_backward(config, manager, model, teacher, batch, device, lambda ids: ids)
        passed = _now(device)
        nn.utils.get_total_norm([each.grad for each in model.parameters() if each.grad is not None])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        passes.append(passed - started)
        updates.append(_now(device) - passed)
    used = memory_in_use(device)
    seconds = sum(passes[1:]) / MEASURED_STEPS * tokens / (size * length) + sum(updates[1:]) / MEASURED_STEPS
    print(
        f"\nseconds of a step: {seconds:.3g}, the run {clock(seconds * config.max_steps)}; measured here on "
        f"{MEASURED_STEPS} steps of {size} × {length} tokens and scaled to {tokens:,}"
    )
    print(f"memory of this process after them: {megabytes(used)}")


def _num_parameters(described: PretrainedConfig) -> int:
    with torch.device("meta"):
        return count_parameters(AutoModelForCausalLM.from_config(described))


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
