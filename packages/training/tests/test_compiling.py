"""Compiled blocks train as the others do, and where nothing compiles a run says so and goes on."""

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from durable import UserError
from wrinklefree.config import load_config
from wrinklefree.run import run
from wrinklefree.runs import read_metrics

SMALL = [
    "model=tiny_llama",
    "data=demo",
    "training=base",
    "training.max_seq_length=32",
    "training.batch_size=2",
    "training.gradient_accumulation_steps=2",
    "training.max_steps=3",
    "training.validation.num_batches=0",
    "training.checkpoint.save_at_end=false",
]


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def losses(output_dir: Path, *overrides: str) -> list[float]:
    directory = run(load_config([*SMALL, f"output_dir={output_dir}", *overrides])).directory
    return [row["loss"] for row in read_metrics(directory / "metrics.jsonl")]


def test_compiled_blocks_have_the_losses_of_eager_ones_and_share_their_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What kernels compute is tested in bitnet_arch; here the graphs are run as they were captured.
    captured = functools.partialmethod(nn.Module.compile, backend="eager")
    monkeypatch.setattr(nn.Module, "compile", captured)
    monkeypatch.setattr("wrinklefree.training.compiling.cpp_compiler", lambda: "c++")
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    # Alone and with documents to keep apart, with QK-clip looking and without; never one for each step.
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 4)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    fully = ["training.lambda_warmup.enabled=false", "training.max_steps=5"]

    eager = losses(tmp_path / "eager", *fully)
    compiled = losses(tmp_path / "compiled", *fully, "training.torch_compile.enabled=true")

    assert compiled == pytest.approx(eager, abs=1e-4)  # another order of sums re-draws roundings to int8
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_a_run_goes_on_where_nothing_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)

    assert losses(tmp_path, "training.torch_compile.enabled=true", "training.max_steps=1")
    assert "no C++ compiler here; training goes on without" in capsys.readouterr().out


def test_sharded_training_with_one_process_shards_nothing_and_with_more_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert losses(tmp_path, "distributed=fsdp_multi", "training.max_steps=1")
    assert "nothing is sharded" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="use distributed=ddp") as caught:
        losses(tmp_path / "more", "distributed=fsdp_multi")
    assert caught.value.exit_code == 2
