"""The batch-size finder: it leaves nothing behind but a number, and a run with it is the run without."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet_arch.bitlinear import bitlinears
from durable import UserError
from wrinklefree.config import load_config
from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.objectives import ManagerOutput, Needs, ObjectiveManager, create_objective_manager
from wrinklefree.run import RunResult, run
from wrinklefree.runs import read_metrics
from wrinklefree.training import batch_size
from wrinklefree.training.batch_size import Trial, divisors, largest_fitting
from wrinklefree.training.student import build_models

SMALL = [
    "experiment=quick",
    "training.influence.enabled=false",
    "training.validation.num_batches=0",
    "training.max_seq_length=32",
    "training.max_steps=3",
    "training.checkpoint.save_interval=10",
    "training.logging.log_interval=100",
]


def train(output_dir: Path, *overrides: str) -> RunResult:
    return run(load_config([*SMALL, f"output_dir={output_dir}", *overrides]))


def losses(result: RunResult) -> list[float]:
    return [row["loss"] for row in read_metrics(result.directory / "metrics.jsonl")]


@pytest.mark.parametrize("most", [1, 2, 3, 5, 12, 100])
def test_the_largest_divisor_that_fits_is_found(most: int) -> None:
    expected = max(size for size in range(1, 13) if 12 % size == 0 and size <= most)

    assert largest_fitting(divisors(12), lambda size: size <= most) == expected


def test_nothing_that_fits_is_exit_2() -> None:
    with pytest.raises(UserError, match="not even one sample") as caught:
        largest_fitting([1, 2], lambda size: False)

    assert caught.value.exit_code == 2


def test_running_out_of_memory_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(SMALL)
    models = build_models(config, checkpoint=None, needs=Needs(teacher_logits=True), calibration=[])
    manager, usual = create_objective_manager(config.training.objectives), ObjectiveManager.step

    def step(self: ObjectiveManager, *arguments: Any) -> ManagerOutput:
        output = usual(self, *arguments)
        if len(arguments[2]) > 2:
            output.loss.backward(retain_graph=True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return output

    monkeypatch.setattr(ObjectiveManager, "step", step)
    before = {name: tensor.clone() for name, tensor in models.student.state_dict().items()}
    dials = [(each.quant_amount, each.activation_amount) for each in bitlinears(models.student)]
    random = torch.get_rng_state()

    found = largest_fitting(divisors(8), Trial(config, models, manager, torch.device("cpu")).fits)

    assert found == 2
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in models.student.state_dict().items())
    assert all(parameter.grad is None for parameter in models.student.parameters())
    assert [(each.quant_amount, each.activation_amount) for each in bitlinears(models.student)] == dials


def test_a_run_with_the_finder_is_the_run_without_and_keeps_its_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(tmp_path / "plain")
    finder = [
        "training.auto_batch_size=true",
        "training.batch_size=4",
        "training.gradient_accumulation_steps=1",
    ]
    with monkeypatch.context() as patch:
        # Three samples fit beside the optimizer and the gradients; of the divisors of 4 that is 2.
        patch.setattr(Trial, "bytes_of_a_sample", lambda self: 2**30)
        room = int(3 * 2**30 * batch_size.HEADROOM) + 200_000 * 12
        patch.setattr(batch_size, "available_memory", lambda: room)
        usual = WrinkleFreeLightningModule.training_step

        def training_step(self: WrinkleFreeLightningModule, *arguments: Any) -> None:
            if self.progress.step == 1:
                signal.raise_signal(signal.SIGTERM)
            usual(self, *arguments)

        patch.setattr(WrinkleFreeLightningModule, "training_step", training_step)
        assert train(tmp_path / "found", *finder).exit_code == 143

    def never(*_: object) -> int:
        raise AssertionError("searched again")

    monkeypatch.setattr(batch_size, "_search", never)
    result = train(tmp_path / "found", *finder)

    assert losses(result) == losses(plain)
    assert json.loads((result.directory / "batch_size.json").read_text()) == {"samples": 4, "batch_size": 2}


def test_what_a_sample_keeps_is_measured(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level("INFO")
    config = load_config(SMALL)
    models = build_models(config, checkpoint=None, needs=Needs(teacher_logits=True), calibration=[])
    trial = Trial(config, models, create_objective_manager(config.training.objectives), torch.device("cpu"))

    short = trial.bytes_of_a_sample()
    config.training.max_seq_length = 64
    long = trial.bytes_of_a_sample()

    # At least the input of each projection in one byte, and about twice as much for twice the tokens.
    layer = models.student.config
    assert short > layer.num_hidden_layers * 32 * (4 * layer.hidden_size + layer.intermediate_size)
    assert 1.5 < long / short < 3
    result = train(tmp_path, "training.auto_batch_size=true", "training.max_steps=1")
    assert "4 × 1 micro-batches = 4 samples a step" in caplog.text
    assert json.loads((result.directory / "batch_size.json").read_text())["batch_size"] == 4
