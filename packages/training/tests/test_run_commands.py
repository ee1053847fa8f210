"""What the commands around a run print."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from durable import lock
from wrinklefree.config import load_config, schema_keys
from wrinklefree.run import run
from wrinklefree.runs import read_metrics

SMALL = [
    "experiment=quick",
    "training.influence.enabled=false",
    "training.validation.num_batches=1",
    "training.max_seq_length=32",
    "training.max_steps=3",
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, prepared_data: Path) -> Iterator[Path]:
    """An output_dir with a finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WRINKLEFREE_DATA", str(prepared_data))
        directory = tmp_path_factory.mktemp("outputs")
        run(load_config([*SMALL, f"output_dir={directory}"]))
        yield directory


@pytest.fixture
def run_dir(outputs: Path) -> Path:
    return outputs / "checkpoints" / "quick" / "base_checkpoint"


def test_eval_prints_the_loss_that_validation_measured(
    wrinklefree: Callable[..., Any], run_dir: Path
) -> None:
    ended = wrinklefree("eval", run_dir, "--batches", 1)

    assert ended.exit_code == 0
    validated = read_metrics(run_dir / "metrics.jsonl", kind="val")[-1]["losses"]["at 1"]
    lines = {line.split()[0]: line.split()[1:] for line in ended.out.splitlines()[3:]}
    assert set(lines) == {*validated, "mean"}
    # Validation took one batch of 2 blocks, this one of 8: the same documents, four times as many.
    assert all(abs(float(lines[name][0]) - value) < 0.2 for name, value in validated.items())


def test_eval_of_nothing_is_one_line(wrinklefree: Callable[..., Any], tmp_path: Path) -> None:
    ended = wrinklefree("eval", tmp_path / "nowhere")

    assert ended.exit_code == 4
    assert ended.err.count("\n") == 1
    assert "no such directory" in ended.err


def test_runs_are_listed_shown_and_compared(
    wrinklefree: Callable[..., Any], outputs: Path, run_dir: Path
) -> None:
    assert "tiny_llama  step 3/3" in wrinklefree("runs", "list", outputs).out
    shown = wrinklefree("runs", "show", run_dir).out
    assert "newest checkpoint that verifies: final" in shown
    compared = wrinklefree("runs", "diff", run_dir, run_dir).out
    assert "3 of 3 losses are equal" in compared
    assert wrinklefree("runs", "list", outputs / "nothing").exit_code == 2
    assert wrinklefree("runs", "show", outputs).exit_code == 4


def test_show_tells_where_the_numbers_come_from(wrinklefree: Callable[..., Any], run_dir: Path) -> None:
    out = wrinklefree("runs", "show", run_dir).out

    content = json.loads((run_dir / "fingerprint.json").read_text())
    assert f"fingerprint {content['fingerprint'][:16]}: commit {content['git']['commit'][:12]}" in out
    assert f"torch {torch.__version__.partition('+')[0]}" in out
    assert "data: stories, sums, almanac, noise" in out


def test_diff_names_keys_and_last_losses(
    wrinklefree: Callable[..., Any], run_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["training"]["optimizer"]["lr_muon"] = 0.25
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    rows = read_metrics(run_dir / "metrics.jsonl")
    with (other / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**rows[-1], "step": 4, "loss": 0.125}) + "\n")

    out = wrinklefree("runs", "diff", run_dir, other).out

    assert "training.optimizer.lr_muon: 0.005 → 0.25" in out
    assert "3 of 3 losses are equal" in out
    assert f"{run_dir}: last loss {rows[-1]['loss']!r}, at step 3" in out
    assert f"{other}: last loss 0.125, at step 4" in out


def test_rm_removes_a_run_and_nothing_else(
    wrinklefree: Callable[..., Any], run_dir: Path, tmp_path: Path
) -> None:
    outputs, elsewhere = tmp_path / "outputs", tmp_path / "elsewhere"
    run = outputs / "checkpoints" / "quick" / "base_checkpoint"
    for copy in (run, elsewhere):
        shutil.copytree(run_dir, copy)
    (outputs / "way_out").symlink_to(elsewhere)
    (outputs / "checkpoints" / "alias").symlink_to(run)

    def rm(path: Path, *options: object) -> Any:
        return wrinklefree("runs", "rm", path, "--outputs", outputs, *options)

    asked = rm(run)
    assert asked.exit_code == 2
    assert "would be removed" in asked.err
    assert "add --yes" in asked.err
    for wrong in (elsewhere, outputs / "way_out", outputs / ".." / "elsewhere", outputs):
        assert rm(wrong, "--yes").exit_code == 2
    assert rm(outputs / "checkpoints", "--yes").exit_code == 2  # not a run, but all of them
    assert rm(outputs / "checkpoints" / "alias", "--yes").exit_code == 2
    with lock(run):
        busy = rm(run, "--yes")
    assert busy.exit_code == 3
    assert str(os.getpid()) in busy.err
    assert run.is_dir()
    assert elsewhere.is_dir()

    assert rm(run, "--yes").exit_code == 0

    assert not run.exists()
    assert (elsewhere / "checkpoints").is_dir()


def test_the_schema_explains_every_key(wrinklefree: Callable[..., Any]) -> None:
    out = wrinklefree("config", "schema").out

    printed = {line.split(":")[0] for line in out.splitlines() if not line.startswith(" ")}
    assert printed == {key for key, _, _ in schema_keys()}


def test_a_configuration_is_shown_and_validated(wrinklefree: Callable[..., Any]) -> None:
    assert "max_steps: 7" in wrinklefree("config", "show", "training.max_steps=7").out
    assert "valid: tiny_llama, base, 3 steps" in wrinklefree("config", "validate", *SMALL).out
    assert "max_steps: 7" in wrinklefree("train", "--print-config", "training.max_steps=7").out
    refused = wrinklefree("config", "validate", "training.max_stepz=7")
    assert refused.exit_code == 2
    assert "did you mean 'training.max_steps'" in refused.err
