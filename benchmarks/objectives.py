"""What does a loss cost on top of the next-token one, when all are computed from one forward?

    uv run python benchmarks/objectives.py                       SmolLM2-135M's shape, 4 × 256 tokens
    uv run python benchmarks/objectives.py --batch 1 --tokens 2048
    uv run python benchmarks/objectives.py --check-only          one forward has the losses of separate ones

Forward and backward of a ternary student with random weights, fp32, one thread, CPU time; the rows take
turns. `separate` runs every view and the clean tokens in forwards of their own, as a trainer does that masks
its batch. Peak memory is of tensors, without weights and gradients.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from shapes import SMOLLM2
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bitnet_arch import (
    BlockDiffusion,
    add_mask_token,
    convert_to_bitnet,
    set_block_diffusion,
    set_quant_amount,
)
from bitnet_arch.testing import tiny_llama
from data_handler import Batch
from wrinklefree.objectives import DiffusionConfig, ObjectiveManager, create_objective_manager
from wrinklefree.teachers.local import LocalTeacher
from wrinklefree.training.live_tensors import LiveTensors

CE = {"continue_pretrain": {"weight": 1.0}}
KD = CE | {"logits_distill": {"weight": 1.0}}
DLM = {"dlm": {"weight": 1.0}}

ROWS: dict[str, list[tuple[Mapping[str, Any], bool]]] = {
    "next token": [(CE, True)],
    "+ one view": [(CE | DLM, False)],
    "+ two views": [(CE | DLM, True)],
    "separate: next token, each view": [(CE, True), (DLM, False), (DLM, False)],
    "next token + teacher": [(KD, True)],
    "+ one view, teacher": [(KD | DLM, False)],
    "+ two views, teacher": [(KD | DLM, True)],
}
"""What is run one after the other: objectives, and whether views come in two."""


def managers(row: str) -> list[ObjectiveManager]:
    return [
        create_objective_manager(specs, diffusion=DiffusionConfig(complementary=two), seed=1)
        for specs, two in ROWS[row]
    ]


def made_up_batch(size: int, length: int, vocab_size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab_size, (size, length), generator=generator)
    places = torch.arange(length).expand(size, length).contiguous()
    zeros = torch.zeros(size, dtype=torch.int64)
    labels = ids.masked_fill(places == 0, -100)
    return Batch(ids, labels, places, torch.zeros_like(places), zeros, torch.arange(size))


def step(model: nn.Module, teacher: LocalTeacher, each: list[ObjectiveManager], batch: Batch) -> list[float]:
    """Forward and backward of all of them; their losses."""
    losses = []
    for manager in each:
        output = manager.step(model, teacher, batch, manager.counts(batch))
        output.loss.backward()
        losses.append(float(output.loss))
    return losses


def peak_bytes(model: nn.Module, teacher: LocalTeacher, row: str, batch: Batch) -> int:
    """Beyond weights and gradients, which are there before."""
    live = LiveTensors()
    kept = [*model.parameters(), *model.buffers(), *teacher.model.parameters(), *teacher.model.buffers()]
    live.watch([*kept, *(p.grad for p in model.parameters() if p.grad is not None)])
    before = live.now
    with live:
        step(model, teacher, managers(row), batch)
    return live.peak - before


def compare(model: nn.Module, teacher: LocalTeacher, batch: Batch, repeats: int, rows: Sequence[str]) -> None:
    prepared = {row: managers(row) for row in rows}
    seconds: dict[str, list[float]] = {row: [] for row in rows}
    for turn in range(repeats + 1):  # the first one warms up
        for row, each in prepared.items():
            started = time.process_time()
            step(model, teacher, each, batch)
            if turn:
                seconds[row].append(time.process_time() - started)
    print("| objectives | s | × next token, median (least to most) | peak of tensors |\n|---|---|---|---|")
    plain = seconds["next token"]
    for row, times in seconds.items():
        ratios = [time / base for time, base in zip(times, plain, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        memory = peak_bytes(model, teacher, row, batch) / 2**20
        print(f"| {row} | {statistics.median(times):.2f} | {spread} | {memory:,.0f} MiB |", flush=True)


def check() -> int:
    """The loss of one forward is the sum of those of separate ones, at λ = 0."""
    model, batch = student(tiny_llama(), quant_amount=0.0), made_up_batch(2, 64, 500)
    teacher = LocalTeacher(tiny_llama(seed=1))
    together = step(model, teacher, managers("+ two views, teacher"), batch)
    alone = [
        step(model, teacher, [create_objective_manager(specs, diffusion=DiffusionConfig(), seed=1)], batch)[0]
        for specs in (KD, DLM)
    ]
    apart = abs(together[0] - sum(alone)) / together[0]
    print(f"the loss of one forward and of two differ by {apart:.1e}, relative")
    if apart > 1e-5:
        print("error: one forward has other losses than separate ones", file=sys.stderr)
        return 1
    return 0


def student(model: Any, *, quant_amount: float = 1.0) -> nn.Module:
    mask = add_mask_token(model)
    set_block_diffusion(model, BlockDiffusion(mask_token_id=mask, block_size=32))
    convert_to_bitnet(model)
    set_quant_amount(model, quant_amount)
    model.train()
    return model  # type: ignore[no-any-return]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check-only", action="store_true", help="equal losses on a tiny model, no timing")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=[*ROWS][1:], action="append", help="one row; may be repeated")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.check_only:
        return check()
    torch.manual_seed(0)
    model = student(LlamaForCausalLM(LlamaConfig(**SMOLLM2)))
    teacher = LocalTeacher(LlamaForCausalLM(LlamaConfig(**SMOLLM2)))
    batch = made_up_batch(options.batch, options.tokens, SMOLLM2["vocab_size"])
    print(f"SmolLM2-135M's shape, {options.batch} × {options.tokens} tokens, one thread\n")
    rows = ["next token", *options.only] if options.only else [*ROWS]
    compare(model, teacher, batch, options.repeats, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
