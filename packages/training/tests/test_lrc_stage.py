"""The low-rank correction as a stage: what is trained, what is not, and that it goes on to the bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitnet_arch import BitLinearLRC, load_bitnet
from bitnet_arch.testing import tiny_llama
from durable import UserError
from wrinklefree.config import load_config
from wrinklefree.lightning.callbacks.frozen import FrozenCallback, frozen_sha256
from wrinklefree.objectives import create_objective_manager
from wrinklefree.run import RunResult, run
from wrinklefree.runs import read_metrics

SMALL = [
    "model=tiny_llama",
    "data=demo",
    "training.max_seq_length=32",
    "training.batch_size=2",
    "training.gradient_accumulation_steps=1",
    "training.validation.num_batches=0",
    "training.max_steps=4",
    "training.checkpoint.save_interval=2",
]


def correct(output_dir: Path, *overrides: str) -> RunResult:
    return run(load_config(["training=lrc_calibration", *SMALL, f"output_dir={output_dir}", *overrides]))


def tensors(directory: Path) -> dict[str, Tensor]:
    return load_bitnet(directory / "checkpoints" / "final").state_dict()


def test_only_the_correction_learns_and_that_is_proven(tmp_path: Path) -> None:
    stage2 = run(load_config(["training=stage2_pretrain", *SMALL, f"output_dir={tmp_path}"]))
    result = correct(tmp_path)

    before, after = tensors(stage2.directory), tensors(result.directory)
    factors = {name for name in after if "lrc_" in name}
    assert factors
    assert before.keys() == after.keys() - factors
    assert all(torch.equal(before[name], after[name]) for name in before)
    model = load_bitnet(result.directory / "checkpoints" / "final")
    layers = [layer for layer in model.modules() if isinstance(layer, BitLinearLRC)]
    assert len(layers) == 14
    lines = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    (proof,) = [line for line in lines if line.get("event") == "frozen_unchanged"]
    for layer in layers:
        layer.weight.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lrc_" in name)
    assert proof["sha256"] == frozen_sha256(model)
    losses = [row["loss"] for row in read_metrics(result.directory / "metrics.jsonl")]
    assert len(losses) == 4

    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "checkpoints", copy / "checkpoints")
    stage = next((copy / "checkpoints").glob("*/lrc_checkpoint"))
    for name in ("final", "step_000004"):
        shutil.rmtree(stage / "checkpoints" / name, ignore_errors=True)
    resumed = correct(copy)
    assert [row["loss"] for row in read_metrics(resumed.directory / "metrics.jsonl")] == losses
    again = tensors(resumed.directory)
    assert all(torch.equal(again[name], after[name]) for name in after)


def test_an_unconverted_model_is_converted_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = correct(tmp_path, "training.lrc={rank: 3, init: svd}", "training.max_steps=1")

    assert "lrc starts from tiny_llama" in capsys.readouterr().out
    model = load_bitnet(result.directory / "checkpoints" / "final")
    assert {layer.rank for layer in model.modules() if isinstance(layer, BitLinearLRC)} == {3}


def test_a_touched_weight_ends_the_run() -> None:
    model = tiny_llama()
    model.requires_grad_(False)
    callback = FrozenCallback(writer=None)
    callback._compare(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1e-6

    with pytest.raises(RuntimeError, match="frozen"):
        callback._compare(model)


@pytest.mark.parametrize("options", ["{rank: 0}", "{rank_percentage: 0}", "{rank_percentage: 1.5}"])
def test_what_cannot_be_is_one_line(options: str) -> None:
    with pytest.raises(UserError, match=r"training\.lrc\.rank"):
        load_config(["model=tiny_llama", "training=lrc_calibration", f"training.lrc={options}"])


def test_the_preset_learns_from_hidden_states_alone() -> None:
    objectives = load_config(["model=tiny_llama", "training=lrc_calibration"]).training.objectives

    assert set(create_objective_manager(objectives).active) == {"lrc_reconstruction"}
