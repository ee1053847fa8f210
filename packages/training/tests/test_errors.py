"""Each test makes a fault happen, by the real command, and compares its line with that in docs/errors.md.

`…` in the page stands for any text. Rows whose fault another test makes name that test.
"""

import ast
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from bitnet_arch import set_quant_amount
from bitnet_serving.testing import save_tiny
from durable import lock, publish, read_manifest
from wrinklefree.lightning.callbacks.saving import CheckpointCallback
from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.objectives import ManagerOutput, ObjectiveManager
from wrinklefree.runs import read_metrics
from wrinklefree.training.running_out import warn_about_room

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "errors.md"
THIS = "packages/training/tests/test_errors.py"


def table() -> dict[str, dict[str, str]]:
    """Row → cells of the page's table of faults."""
    rows = {}
    _, _, faults = PAGE.read_text(encoding="utf-8").partition("# Faults of a run")
    for line in faults.splitlines():
        if re.match(r"\| \d+[a-z]? \|", line):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            row, fault, said, code, todo, test = cells
            rows[row] = {"fault": fault, "said": said.strip("` "), "code": code, "todo": todo, "test": test}
    return rows


TABLE = table()


def assert_says(row: str, output: str) -> None:
    """The line of that row is in the output, alone on its line."""
    pattern = ".*".join(re.escape(part) for part in TABLE[row]["said"].split("…"))
    assert any(re.fullmatch(pattern, line) for line in output.splitlines()), f"{pattern}\n{output}"


SMALL = [
    "experiment=quick",
    "training.influence.enabled=false",
    "training.validation.num_batches=0",
    "training.max_seq_length=16",
    "training.max_steps=4",
    "training.checkpoint.save_interval=2",
]


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)


@pytest.fixture
def train(wrinklefree: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """`wrinklefree train` of a small run in this test's own directory."""
    return lambda *overrides: wrinklefree("train", *SMALL, f"output_dir={tmp_path}", *overrides)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / "quick" / "base_checkpoint"


WRONG_CONFIGURATIONS = {
    "1": ["trainig.max_steps=5"],
    "2a": ["training.max_steps=1e3x"],
    "2b": ["training.max_steps=.nan"],
    "2c": ["training.max_steps=1e999"],
    "2d": ["training.max_steps=0"],
    "3": ["training=unifed"],
    "4a": ["experiment_name=${oc.env:NOT_SET}"],
    "4b": ["experiment_name=${output_dir}", "output_dir=${experiment_name}"],
    "5": ["training.lambda_warmup.warmup_steps=10", "training.max_steps=5"],
    "6a": ["training.curriculum.enabled=true", "training.curriculum.phases=[{until: 0.8},{until: 0.3}]"],
    "6b": ["training.curriculum.enabled=true", "training.curriculum.phases=[]"],
    "7a": ["training.objectives.continue_pretrain.weight=-1"],
    "7b": [
        "training=base",
        "training.objectives.continue_pretrain.weight=0",
        "training.objectives.logits_distill.weight=0",
    ],
    "9": ["training.objectives.logits_distil.weight=1"],
}


@pytest.mark.parametrize("row", WRONG_CONFIGURATIONS)
def test_a_wrong_configuration_is_the_line_of_the_page(
    row: str, wrinklefree: Callable[..., Any], tmp_path: Path
) -> None:
    ended = wrinklefree("train", "model=tiny_llama", f"output_dir={tmp_path}/out", *WRONG_CONFIGURATIONS[row])

    assert (str(ended.exit_code), ended.out) == (TABLE[row]["code"], "")
    assert ended.err.count("\n") == 1
    assert_says(row, ended.err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("row", "weights"), [("8a", [0.5, -0.5]), ("8b", [float("nan"), 1.0]), ("8c", [0.0, 0.0])]
)
def test_wrong_mixture_weights_name_the_source(
    row: str, weights: list[float], train: Callable[..., Any], tmp_path: Path
) -> None:
    sources = {
        name: {"format": "demo", "path": "stories", "weight": weight, "licence": "CC0-1.0", "domain": "web"}
        for name, weight in zip(("web", "code"), weights, strict=True)
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "description": "Mine.", "sources": sources}))

    ended = train(f"data.config_name={path}")

    assert str(ended.exit_code) == TABLE[row]["code"]
    assert_says(row, ended.err)


def test_blocks_longer_than_the_model(train: Callable[..., Any]) -> None:
    ended = train("training.max_seq_length=100000")

    assert str(ended.exit_code) == TABLE["13"]["code"]
    assert_says("13", ended.err)


def test_a_shard_that_vanishes_is_named(
    train: Callable[..., Any], tmp_path: Path, prepared_data: Path
) -> None:
    data = tmp_path / "data"
    train("training.max_steps=1", "experiment_name=other")  # where nobody prepared it yet
    (prepared,) = prepared_data.glob("demo-*")
    shutil.copytree(prepared, data)
    assert train("training.max_steps=2", f"data.directory={data}").exit_code == 0
    (data / "sums" / "train" / "tokens-00000.bin").unlink()

    ended = train("training.max_steps=4", f"data.directory={data}")

    assert str(ended.exit_code) == TABLE["20"]["code"]
    assert_says("20", ended.err)


def test_a_pickle_bomb_is_refused_and_does_not_go_off(train: Callable[..., Any], tmp_path: Path) -> None:
    bomb, trace = tmp_path / "checkpoint.pt", tmp_path / "exploded"
    bomb.write_text(f"cbuiltins\nopen\n(S'{trace}'\nS'w'\ntR.")  # open(trace, "w")

    ended = train(f"training.resume.checkpoint_path={bomb}")

    assert str(ended.exit_code) == TABLE["23"]["code"]
    assert_says("23", ended.err)
    assert not trace.exists()
    subprocess.run([sys.executable, "-m", "pickle", bomb], capture_output=True, check=False)
    assert trace.exists()  # it would have


def test_a_run_of_another_model_or_seed_is_refused_with_the_keys(train: Callable[..., Any]) -> None:
    assert train().exit_code == 0

    for row, changes in (("22", ["model=tiny_qwen3"]), ("26", ["seed=7", "training.optimizer.lr_muon=0.1"])):
        ended = train("training.max_steps=5", *changes)

        assert str(ended.exit_code) == TABLE[row]["code"]
        assert_says(row, ended.err)


def test_what_a_used_directory_says(
    train: Callable[..., Any], run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "wrinklefree")
    assert train().exit_code == 0
    with lock(run_dir):
        busy = train()
    (tmp_path / "file").touch()
    other = "training.max_steps=5"
    said = {
        "27": train(other, "training.batch_size=4"),
        "28": train(),
        "29": train("experiment_name=next", f"training.resume.checkpoint_path={tmp_path}/nowhere"),
        "30": train(f"output_dir={tmp_path}/file"),
        "33": busy,
    }
    newest = run_dir / "checkpoints" / "final" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    said["21"] = train(other)

    for row, ended in said.items():
        assert str(ended.exit_code) == TABLE[row]["code"]
        assert_says(row, "\n".join([ended.out + ended.err, *caplog.messages]))


def test_losses_that_stay_infinite_end_the_run(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = ObjectiveManager.step

    def step(self: ObjectiveManager, *arguments: Any) -> ManagerOutput:
        output = usual(self, *arguments)
        return replace(output, loss=output.loss * float("inf"))

    monkeypatch.setattr(ObjectiveManager, "step", step)

    ended = train("training.non_finite.max_skipped=1")

    assert str(ended.exit_code) == TABLE["35"]["code"]
    assert_says("35", ended.err)


def test_a_checkpoint_of_another_format_is_named_with_both_versions(
    train: Callable[..., Any], run_dir: Path, tmp_path: Path
) -> None:
    assert train("training.max_steps=2").exit_code == 0
    old, source = tmp_path / "old", run_dir / "checkpoints" / "step_000002"
    with publish(old, metadata=dict(read_manifest(source).metadata)) as directory:
        for path in source.iterdir():
            if path.name not in ("manifest.json", "train_state.json"):
                shutil.copy(path, directory)
        state = json.loads((source / "train_state.json").read_text()) | {"format_version": 0}
        (directory / "train_state.json").write_text(json.dumps(state))

    ended = train(f"training.resume.checkpoint_path={old}", "experiment_name=next")

    assert str(ended.exit_code) == TABLE["60"]["code"]
    assert_says("60", ended.err)


def test_a_file_that_may_not_grow_ends_the_run_and_keeps_what_is_there(
    train: Callable[..., Any], run_dir: Path
) -> None:
    assert train("training.max_steps=2").exit_code == 0
    before = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        ended = train("training.max_steps=4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, handler)

    assert str(ended.exit_code) == TABLE["31"]["code"]
    assert_says("31", ended.err)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == before
    assert train("training.max_steps=4").exit_code == 0


def test_little_room_is_a_warning_with_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = namedtuple("usage", "total used free")
    model = torch.nn.Linear(1000, 1000, bias=False)  # 4 MB, and 8 of optimizer state
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 25_000_000))
    warn_about_room(tmp_path, model)
    assert caplog.text == ""

    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 23_000_000))
    warn_about_room(tmp_path, model)

    assert_says("32", caplog.messages[-1])


def during(call: str, fault: Callable[[], object], *, at: int) -> Callable[..., Any]:
    """A training step, or a save, in which something happens once."""
    owner: Any = WrinkleFreeLightningModule if call == "training_step" else CheckpointCallback
    usual, count = getattr(owner, call), iter(range(10**6))

    def patched(self: Any, *arguments: Any) -> Any:
        if next(count) == at:
            fault()
        return usual(self, *arguments)

    return patched


def test_a_signal_during_a_save_lets_it_finish_and_saves_once(
    train: Callable[..., Any], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointCallback, "save", during("save", terminate, at=0))
        ended = train()

    assert str(ended.exit_code) == TABLE["40"]["code"]
    steps = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert steps[0] == "step_000002"
    assert len(steps) <= 2  # the step that was under way, at most
    assert train().exit_code == 0


def test_an_allocation_that_fails_names_the_keys_to_lower(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate() -> None:
        torch.empty(2**46, dtype=torch.uint8)

    monkeypatch.setattr(WrinkleFreeLightningModule, "training_step", during("training_step", allocate, at=1))

    ended = train()

    assert str(ended.exit_code) == TABLE["45"]["code"]
    assert_says("45", ended.err)


def test_a_clock_that_jumps_back_changes_nothing(
    train: Callable[..., Any], run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train().exit_code == 0
    usual = read_metrics(run_dir / "metrics.jsonl")
    weights = load_file(run_dir / "checkpoints" / "final" / "model.safetensors")
    years = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: 1e9 - 3e7 * next(years))

    assert train(f"output_dir={tmp_path / 'jumping'}").exit_code == 0

    jumping = tmp_path / "jumping" / run_dir.relative_to(tmp_path)
    rows = read_metrics(jumping / "metrics.jsonl")
    assert [(row["loss"], row["samples"]) for row in rows] == [(row["loss"], row["samples"]) for row in usual]
    again = load_file(jumping / "checkpoints" / "final" / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())


def test_an_export_below_full_quantisation_names_the_flag(
    wrinklefree: Callable[..., Any], tmp_path: Path
) -> None:
    half = save_tiny(tmp_path / "half", change=partial(set_quant_amount, amount=0.5))

    for command in (("gguf", half, tmp_path / "model.gguf"), ("hf", half, tmp_path / "out")):
        ended = wrinklefree("export", *command)

        assert str(ended.exit_code) == TABLE["51"]["code"]
        assert_says("51", ended.err)
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_every_test_that_the_page_names_is_there() -> None:
    assert [row for row, cells in TABLE.items() if "::" not in cells["test"]] == []
    for file, name in set(re.findall(r"`([\w/.]+)::(\w+)`", PAGE.read_text(encoding="utf-8"))):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{file}::{name}"


def test_every_row_that_is_owed_is_on_the_page() -> None:
    owed = {*range(1, 12), 13, 15, *range(19, 25), *range(26, 41), *range(44, 59), 60}

    assert {int(re.sub(r"\D", "", row)) for row in TABLE} == owed


def test_rows_with_a_line_of_this_file_are_compared_with_it() -> None:
    """A row that names a test of this file and quotes an error is looked at by `assert_says`."""
    source = (ROOT / THIS).read_text(encoding="utf-8")
    for row, cells in TABLE.items():
        if THIS in cells["test"] and cells["said"].startswith("error:"):
            assert f'"{row}"' in source, row
