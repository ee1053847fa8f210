"""`train --dry-run` says what a run takes: counted here in real steps, by a counter of its own."""

import copy
import functools
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bitnet_arch import BlockDiffusion, convert_to_bitnet, set_block_diffusion, set_quant_amount
from bitnet_arch.testing import tiny_llama
from wrinklefree.config import RunConfig, load_config
from wrinklefree.objectives import create_objective_manager
from wrinklefree.optimizers.build import build_optimizer
from wrinklefree.pretrained import described_by
from wrinklefree.teachers.local import LocalTeacher
from wrinklefree.training.step_memory import estimated_memory, made_up_batch

SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)


def config(*overrides: str) -> RunConfig:
    """Next tokens and a teacher."""
    objectives = ["training.objectives.logits_distill={weight: 0.5}"]
    return load_config(
        ["model=tiny_llama", "training=base", *objectives, "training.max_steps=10", *overrides]
    )


class Count(TorchDispatchMode):
    """After every operation, the bytes of all storages that something still holds."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: dict[int, weakref.ref[Any]] = {}
        self.num_bytes = self.peak = 0
        self.add(tensors)

    def add(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self.storages.get(storage.data_ptr())
            if known is None or known() is None:
                self.num_bytes += storage.nbytes()
                gone = functools.partial(self.forget, storage.nbytes())
                self.storages[storage.data_ptr()] = weakref.ref(storage, gone)
        self.peak = max(self.peak, self.num_bytes)

    def forget(self, num_bytes: int, _: object) -> None:
        self.num_bytes -= num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add([leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])
        return result


def measured_peak(run: RunConfig, dense: PreTrainedModel, *, quant_amount: float) -> int:
    """Most bytes of live tensors in two real optimizer steps."""
    teacher = copy.deepcopy(dense).eval().requires_grad_(False)
    convert_to_bitnet(dense)
    set_quant_amount(dense, quant_amount)
    dense.train()
    manager = create_objective_manager(run.training.objectives, diffusion=run.training.diffusion)
    if manager.needs().masked_views:
        set_block_diffusion(dense, BlockDiffusion(mask_token_id=2, block_size=32))
    optimizer = build_optimizer(dense, run.training.optimizer)
    batch = made_up_batch(run.training.batch_size, run.training.max_seq_length)
    models = (dense, teacher)
    counter = Count([each for model in models for each in (*model.parameters(), *model.buffers())])
    with counter:
        for _ in range(2):
            for _ in range(run.training.gradient_accumulation_steps):
                output = manager.step(dense, LocalTeacher(teacher), batch, manager.counts(batch))
                output.loss.backward()
                del output
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return counter.peak


@pytest.mark.parametrize(
    ("warm_up", "amount", "accumulation", "masked"),
    [
        ("true", 0.5, 1, 0),
        ("true", 0.5, 2, 0),
        ("false", 1.0, 1, 0),
        ("false", 1.0, 1, 1),
        ("true", 0.5, 2, 1),
    ],
)
def test_memory_of_the_tiny_model_is_what_a_real_step_takes(
    warm_up: str, amount: float, accumulation: int, masked: int
) -> None:
    run = config(
        f"training.lambda_warmup.enabled={warm_up}",
        f"training.gradient_accumulation_steps={accumulation}",
        f"training.objectives.dlm={{weight: {masked}}}",
    )
    described: Any = described_by("tiny_llama")
    manager = create_objective_manager(run.training.objectives, diffusion=run.training.diffusion)

    estimate = estimated_memory(run, manager, described, described, torch.device("cpu"))

    torch.manual_seed(0)
    real = measured_peak(run, LlamaForCausalLM(described), quant_amount=amount)
    assert estimate.peak == pytest.approx(real, rel=0.15)
    assert estimate.weights == estimate.teacher
    assert estimate.weights >= 4 * tiny_llama().num_parameters()


RESIDENT = """
import sys
import torch
sys.path.insert(0, {tests!r})
from test_dry_run import SMOLLM2, config, measured_peak
from transformers import LlamaForCausalLM
from wrinklefree.training.memory import memory_in_use
import resource
before = memory_in_use(torch.device("cpu"))
run = config(*{overrides!r})
real = measured_peak(run, LlamaForCausalLM(SMOLLM2), quant_amount=1.0)
print(real, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


@pytest.mark.slow
def test_memory_of_smollm2_is_what_a_real_step_takes_of_tensors_and_of_the_system() -> None:
    overrides = [
        "training.batch_size=2",
        "training.max_seq_length=64",
        "training.optimizer.type=adamw",  # quicker, and 4 bytes more a weight
        "training.gradient_accumulation_steps=1",
        "training.lambda_warmup.enabled=false",
    ]
    run = config(*overrides)
    manager = create_objective_manager(run.training.objectives)

    estimate = estimated_memory(run, manager, SMOLLM2, SMOLLM2, torch.device("cpu"))

    program = RESIDENT.format(tests=str(Path(__file__).parent), overrides=overrides)
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    real, resident = map(int, answer.stdout.split()[-2:])
    assert estimate.peak == pytest.approx(real, rel=0.15)
    # The system counts what allocators keep for later, too.
    assert 0.85 * estimate.peak < resident < 1.4 * estimate.peak


def test_the_command_prints_sizes_and_measures_what_is_here(
    wrinklefree: Callable[..., Any], tmp_path: Path
) -> None:
    output_dir = tmp_path / "outputs"

    ended = wrinklefree(
        "train", "--dry-run", "model=tiny_llama", "training.max_steps=10", f"output_dir={output_dir}"
    )

    assert ended.exit_code == 0
    parameters = tiny_llama().num_parameters()
    assert re.search(rf"parameters +{parameters:,}\n", ended.out)
    assert re.search(r"steps +10\n", ended.out)
    assert re.search(r"tokens +5,120 \(8 × 64 a step\)", ended.out)
    assert re.search(r"memory per device +[\d.]+ MB", ended.out)
    assert re.search(
        r"seconds of a step: [\d.e-]+, the run \d+:\d\d:\d\d; measured here on 3 steps", ended.out
    )
    assert not output_dir.exists()


@pytest.mark.parametrize("which", ["backend=vllm", "cache={}"])
def test_no_server_is_asked_and_no_cache_filled(
    which: str, wrinklefree: Callable[..., Any], tmp_path: Path
) -> None:
    there = ["training.teacher.base_url=http://127.0.0.1:9"] if "vllm" in which else []
    teacher = [f"training.teacher.{which.format(tmp_path / 'cache')}", *there]
    objectives = ["training.objectives.logits_distill.weight=1", "training.max_steps=10"]
    sizes = ["training.max_seq_length=32", "training.batch_size=2", f"output_dir={tmp_path}"]

    ended = wrinklefree(
        "train", "--dry-run", "model=tiny_llama", "training=base", *objectives, *teacher, *sizes
    )

    assert ended.exit_code == 0, ended.err
    assert "measured here on 3 steps" in ended.out
    assert not list(tmp_path.iterdir())
    has_model = re.search(r"teacher +0 B\n", ended.out) is None
    assert has_model == ("cache" in which)


def test_a_model_whose_weights_are_not_here_is_estimated_and_not_measured(
    wrinklefree: Callable[..., Any], tmp_path: Path
) -> None:
    LlamaConfig(
        vocab_size=512, hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32
    ).save_pretrained(tmp_path)

    ended = wrinklefree(
        "train",
        "--dry-run",
        "model=tiny_llama",
        "training.max_steps=10",
        f"model.pretrained_name={tmp_path}",
        "training=base",
        "training.batch_size=1",
    )

    assert ended.exit_code == 0
    assert "not measured, the weights of" in ended.out
    assert "are not here" in ended.out
    # 202,383,360 in the layer, 2 · 512 · 4096 in embeddings and head, 4096 in the last norm.
    assert re.search(r"parameters +206,581,760\n", ended.out)
