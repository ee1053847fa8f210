"""What does saving cost?

    uv run python benchmarks/saving.py                 SmolLM2-135M's shape: time against steps, memory
    uv run python benchmarks/saving.py --check-only    the tiny model: what was saved reads back, no numbers

A checkpoint of a ternary decoder with AdamW's state is written as a run writes it: tensors, sha256 of every
file, fsync, manifest, rename. Its time is set against 100 optimizer steps of 4 × 256 tokens, the interval of
the bound (below 5 %); wall time, since the disk is waited for. Memory is this process's peak above what it
held before, by the kernel's own count, against the bytes of model and optimizer (at most 10 %).
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from resident import forget_peak, resident
from safetensors.torch import load_file
from shapes import SMOLLM2
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bitnet_arch import ConversionConfig, convert_to_bitnet
from bitnet_arch.testing import tiny_llama
from durable import verify
from wrinklefree.optimizers.build import build_optimizer
from wrinklefree.optimizers.config import OptimizerConfig, OptimizerType
from wrinklefree.optimizers.state import split_state
from wrinklefree.training.checkpoint import TrainState, write_checkpoint

INTERVAL = 100


def build(*, tiny: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = tiny_llama() if tiny else LlamaForCausalLM(LlamaConfig(**SMOLLM2))
    convert_to_bitnet(model, ConversionConfig())
    model.train()
    return model


def step_seconds(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> float:
    """Wall time of an optimizer step, the second of two."""
    tokens = torch.randint(0, 500, (4, 256))
    for _ in range(2):
        start = time.perf_counter()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def save(model: PreTrainedModel, optimizer: torch.optim.Optimizer, target: Path) -> int:
    """Bytes of model and optimizer."""
    tensors, numbers = split_state(optimizer)
    state = TrainState(step=1, config={}, parts={}, optimizer=numbers, tensors=tensors)
    write_checkpoint(target, model, state, tokenizer=None, stage="benchmark")
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    return parameters + sum(tensor.nbytes for tensor in tensors.values())


def check() -> bool:
    model = build(tiny=True)
    optimizer = build_optimizer(model, OptimizerConfig(type=OptimizerType.adamw))
    step_seconds(model, optimizer)
    with tempfile.TemporaryDirectory() as name:
        save(model, optimizer, Path(name) / "step_000001")
        verify(Path(name) / "step_000001")
        saved = load_file(Path(name) / "step_000001" / "model.safetensors")
    return all(torch.equal(tensor, saved[key]) for key, tensor in model.state_dict().items() if key in saved)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check-only", action="store_true", help="the tiny model reads back, no numbers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to write; none is the system's temporary place")
    options = parser.parse_args()
    if options.check_only:
        print("what was saved reads back" if (same := check()) else "error: it reads back different")
        return 0 if same else 1
    torch.set_num_threads(1)
    model = build(tiny=False)
    optimizer = build_optimizer(model, OptimizerConfig(type=OptimizerType.adamw))
    step = step_seconds(model, optimizer)
    seconds, extra = [], []
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        for number in range(options.repeats):
            forget_peak()
            before, start = resident("VmRSS"), time.perf_counter()
            num_bytes = save(model, optimizer, Path(name) / f"step_{number:06d}")
            seconds.append(time.perf_counter() - start)
            extra.append(resident("VmHWM") - before)
    share, memory = statistics.median(seconds) / (INTERVAL * step), max(extra) / num_bytes
    print("| | found | bound |\n|---|---|---|")
    print(f"| state | {num_bytes / 2**20:.0f} MiB | |")
    print(f"| a save | {statistics.median(seconds):.2f} s | |")
    print(f"| a step | {step:.2f} s | |")
    print(f"| saving every {INTERVAL} steps | {share:.2%} | 5 % |")
    print(f"| memory above the state | {memory:.1%} | 10 % |")
    return 0 if share < 0.05 and memory <= 0.10 else 1


if __name__ == "__main__":
    sys.exit(main())
