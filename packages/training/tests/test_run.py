"""Runs of the trainer on a tiny model: what they leave behind, and what they refuse."""

import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from durable import LOCK_NAME, UserError, lock
from wrinklefree.config import load_config
from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.objectives import ManagerOutput, ObjectiveManager
from wrinklefree.run import RunResult, run
from wrinklefree.runs import read_metrics
from wrinklefree.training.data import PreparedData, prepare_data
from wrinklefree.training.run_directory import RunDirectory

SMALL = [
    "experiment=quick",
    "training.influence.enabled=false",
    "training.validation.num_batches=0",
    "training.max_seq_length=32",
    "training.max_steps=6",
    "training.checkpoint.save_interval=2",
    "training.logging.log_interval=100",
]


def train(output_dir: Path, *overrides: str) -> RunResult:
    return run(load_config([*SMALL, f"output_dir={output_dir}", *overrides]))


def losses(directory: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(directory / "metrics.jsonl")]


def final_weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "checkpoints" / "final" / "model.safetensors")


def stopping_after(step: int, number: int = signal.SIGTERM) -> Callable[..., Any]:
    """A training step that sends this process a signal when `step` is done."""
    usual = WrinkleFreeLightningModule.training_step

    def training_step(self: WrinkleFreeLightningModule, *arguments: Any) -> None:
        if self.progress.step == step - 1:
            os.kill(os.getpid(), number)
        usual(self, *arguments)

    return training_step


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from beginning to end."""
    result = train(tmp_path_factory.mktemp("whole"))
    assert (result.step, result.exit_code) == (6, 0)
    return result.directory


DISTILLING = {
    "stage1_9_layerwise": {"layerwise", "logits_distill"},
    "stage3_distill": {"bitdistill"},
    "bitdistill_full": {"logits_distill", "attention_distill"},
    "lrc_calibration": {"lrc_reconstruction"},
}


@pytest.mark.parametrize("preset", DISTILLING)
def test_a_preset_that_distils_takes_a_step(preset: str, tmp_path: Path) -> None:
    short = ["training.batch_size=2", "training.gradient_accumulation_steps=1", "training.max_steps=2"]
    rest = [word for word in SMALL[2:] if "max_steps" not in word]
    overrides = ["model=tiny_llama", "data=demo", f"training={preset}", f"output_dir={tmp_path}"]

    result = run(load_config([*overrides, *rest, *short]))

    row, _ = read_metrics(result.directory / "metrics.jsonl")
    assert set(row["losses"]) - {"continue_pretrain"} == DISTILLING[preset]
    assert all(0 < value < math.inf for value in row["losses"].values())


def test_a_teacher_that_does_not_fit_is_refused_before_the_first_step(tmp_path: Path) -> None:
    teacher = ["training.teacher.pretrained_name=tiny_mistral", "training=lrc_calibration"]

    with pytest.raises(
        UserError, match=r"^objectives\.lrc_reconstruction\.teacher_layers: .*2 and 3"
    ) as refused:
        run(load_config(["model=tiny_llama", "data=demo", *SMALL[2:], *teacher, f"output_dir={tmp_path}"]))

    assert refused.value.exit_code == 2
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_run_leaves_what_the_design_says(whole: Path) -> None:
    names = {path.name for path in (whole / "checkpoints").iterdir()}

    assert names == {"step_000002", "step_000004", "step_000006", "final"}
    assert {"config.yaml", "metrics.jsonl", "metrics.csv"} <= {path.name for path in whole.iterdir()}
    assert whole.parts[-3:] == ("checkpoints", "quick", "base_checkpoint")
    rows = read_metrics(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["samples"] for row in rows] == [list(range(4 * n, 4 * n + 4)) for n in range(6)]
    assert rows[0]["lambda"] == 0.0
    assert rows[-1]["lambda"] == rows[-1]["mu"] == 1.0
    assert rows[-1]["tokens"] == 6 * 4 * 32
    suffixes = {path.suffix for path in whole.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".csv", ".yaml", ".md", ".jinja", ".lock"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on_to_the_same_bits(
    number: int, code: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(WrinkleFreeLightningModule, "training_step", stopping_after(3, number))
        stopped = train(tmp_path)
    assert (stopped.step, stopped.exit_code) == (3, code)
    assert (stopped.directory / "checkpoints" / "step_000003").is_dir()

    train(tmp_path)

    assert losses(stopped.directory) == losses(whole)
    expected = final_weights(whole)
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in final_weights(stopped.directory).items()
    )


def test_a_finished_run_is_left_alone(whole: Path) -> None:
    def state() -> dict[str, tuple[int, int]]:
        files = [path for path in whole.rglob("*") if path.is_file() and path.name != LOCK_NAME]
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}

    before = state()

    result = train(whole.parents[2])

    assert (result.step, result.exit_code) == (6, 0)
    assert state() == before


def make_foreign(path: Path) -> None:
    """The newest directory is of another program."""
    foreign = path.parents[1] / "step_000009"
    path.parent.rename(foreign)
    (foreign / "manifest.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: os.truncate(path, path.stat().st_size // 2), "model.safetensors"),
        (lambda path: path.write_bytes(b""), "model.safetensors"),
        (lambda path: _flip_bit(path), "model.safetensors"),
        (make_foreign, "manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_and_named(
    damage: Callable[[Path], object],
    said: str,
    whole: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output_dir = tmp_path / "copy"
    shutil.copytree(whole.parents[2], output_dir)
    directory = RunDirectory.of(load_config([*SMALL, f"output_dir={output_dir}"]))
    shutil.rmtree(directory.checkpoints / "final")
    damage(directory.checkpoint(6) / "model.safetensors")

    result = train(output_dir)

    assert result.exit_code == 0
    assert "resuming after step 4" in capsys.readouterr().out
    assert any(said in record.message and "skipped" in record.message for record in caplog.records)
    assert losses(result.directory) == losses(whole)


def test_a_final_checkpoint_that_a_kill_cost_is_written_again(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole.parents[2], tmp_path / "copy")
    directory = next((tmp_path / "copy").rglob("checkpoints/final")).parents[1]
    shutil.rmtree(directory / "checkpoints" / "final")

    train(tmp_path / "copy")

    expected = final_weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in final_weights(directory).items())


def test_when_no_checkpoint_verifies_nothing_starts_anew(whole: Path, tmp_path: Path) -> None:
    output_dir = tmp_path / "copy"
    shutil.copytree(whole.parents[2], output_dir)
    for path in output_dir.rglob("model.safetensors"):
        _flip_bit(path)

    with pytest.raises(UserError, match=r"nothing that verifies") as caught:
        train(output_dir)

    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("seed=7", "seed 42 → 7"),
        ("training.optimizer.lr_muon=0.1", "training.optimizer.lr_muon 0.005 → 0.1"),
        ("data.window_samples=32", "data.window_samples 16 → 32"),
        ("training.objectives.logits_distill.weight=0.1", "training.objectives.logits_distill.weight"),
        ("training.batch_size=4", "samples of a step"),
        ("training.max_steps=4", "which is fewer"),
    ],
)
def test_another_configuration_is_refused_with_the_keys(change: str, key: str, whole: Path) -> None:
    with pytest.raises(UserError) as caught:
        train(whole.parents[2], change)

    assert caught.value.exit_code == 2
    assert key in str(caught.value)


def test_more_steps_and_another_cut_of_the_batch_are_welcome(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole.parents[2], tmp_path / "copy")

    result = train(
        tmp_path / "copy",
        "training.max_steps=8",
        "training.batch_size=1",
        "training.gradient_accumulation_steps=4",
    )

    assert result.step == 8
    rows = read_metrics(result.directory / "metrics.jsonl")
    assert rows[-1]["samples"] == [28, 29, 30, 31]
    assert [row["lambda"] for row in rows[-3:]] == [1.0, 1.0, 1.0]  # ramps do not start again


def test_an_allowed_change_is_accepted(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole.parents[2], tmp_path / "copy")

    result = train(
        tmp_path / "copy",
        "training.max_steps=7",
        "training.optimizer.lr_muon=0.001",
        "training.resume.allow=[training.optimizer.lr_muon]",
    )

    assert result.step == 7


def test_a_second_run_in_the_directory_is_refused(whole: Path) -> None:
    with lock(whole), pytest.raises(UserError) as caught:
        train(whole.parents[2])

    assert caught.value.exit_code == 3


def test_a_run_can_start_from_a_checkpoint_of_another(whole: Path, tmp_path: Path) -> None:
    source = whole / "checkpoints" / "step_000004"
    result = train(tmp_path, f"training.resume.checkpoint_path={source}/checkpoint.pt")

    assert result.step == 6
    assert losses(result.directory) == losses(whole)[4:]


def test_a_start_with_weights_alone_begins_at_sample_0(whole: Path, tmp_path: Path) -> None:
    result = train(
        tmp_path,
        f"training.resume.checkpoint_path={whole / 'checkpoints'}",
        "training.resume.load_training_state=false",
        "training.resume.load_scheduler_state=false",
        "training.resume.load_optimizer_state=false",
    )

    rows = read_metrics(result.directory / "metrics.jsonl")
    assert rows[0]["samples"] == [0, 1, 2, 3]
    assert rows[0]["lambda"] == 0.0


def test_an_explicit_path_that_is_missing_never_starts_fresh(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train(tmp_path, f"training.resume.checkpoint_path={tmp_path / 'nowhere'}")

    assert caught.value.exit_code == 4


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    bomb = tmp_path / "checkpoint.pt"
    bomb.write_bytes(b"\x80\x04\x95")

    with pytest.raises(UserError, match="pickle") as caught:
        train(tmp_path, f"training.resume.checkpoint_path={bomb}")

    assert caught.value.exit_code == 4


def test_an_output_dir_that_is_a_file_is_exit_5(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(UserError, match="cannot be written") as caught:
        train(tmp_path / "file")

    assert caught.value.exit_code == 5


def test_blocks_longer_than_the_model_are_exit_2(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training.max_seq_length.*the model has") as caught:
        train(tmp_path, "training.max_seq_length=100000")

    assert caught.value.exit_code == 2


def with_loss(value: float, *, at: set[int]) -> Callable[..., Any]:
    """`ObjectiveManager.step` with this loss in some of its calls, from 0."""
    usual, calls = ObjectiveManager.step, iter(range(10**6))

    def step(self: ObjectiveManager, *arguments: Any) -> ManagerOutput:
        output = usual(self, *arguments)
        factor = value if next(calls) in at else 1.0
        return ManagerOutput(loss=output.loss * factor, losses=output.losses, ce_loss=output.ce_loss)

    return step


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_without_finite_numbers_is_left_out(
    bad: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ObjectiveManager, "step", with_loss(bad, at={4}))  # in the third of six steps

    result = train(tmp_path, "training.checkpoint.save_interval=1")

    rows = read_metrics(result.directory / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [False, False, True, False, False, False]
    events = read_metrics(result.directory / "metrics.jsonl", kind="event")
    assert events[0]["event"] == "non_finite"
    assert events[0]["samples"] == rows[2]["samples"]
    before, after = (
        load_file(result.directory / "checkpoints" / name / "model.safetensors")
        for name in ("step_000002", "step_000003")
    )
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    for path in result.directory.rglob("*.safetensors"):
        assert all(
            tensor.isfinite().all() for tensor in load_file(path).values() if tensor.is_floating_point()
        )


def test_too_many_such_steps_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ObjectiveManager, "step", with_loss(math.nan, at=set(range(4, 100))))

    with pytest.raises(UserError, match="diverged") as caught:
        train(tmp_path, "training.non_finite.max_skipped=1")

    assert caught.value.exit_code == 6


def test_validation_changes_no_bit(whole: Path, tmp_path: Path) -> None:
    result = train(tmp_path, "training.validation.every=2", "training.validation.num_batches=1")

    assert losses(result.directory) == losses(whole)
    rows = read_metrics(result.directory / "metrics.jsonl", kind="val")
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert rows[0]["losses"].keys() == {"full precision", "at 1"}
    assert rows[-1]["losses"]["now"] == rows[-1]["losses"]["at 1"]  # both dials have arrived


@pytest.mark.parametrize("cut", [(1, 8), (8, 1)])
def test_the_cut_into_micro_batches_does_not_matter(cut: tuple[int, int], tmp_path: Path) -> None:
    # At λ = 0: with int8 activations a difference of 1e-7 draws other roundings (design §5).
    plain = [
        "training.lambda_warmup.warmup_steps=5",
        "training.max_steps=6",
        "model.attention_dropout=0",
        "training.optimizer.type=adamw",
        "training.optimizer.lr=1e-3",
    ]
    one = train(tmp_path / "a", *plain, "training.batch_size=4", "training.gradient_accumulation_steps=2")
    other = train(
        tmp_path / "b",
        *plain,
        f"training.batch_size={cut[0]}",
        f"training.gradient_accumulation_steps={cut[1]}",
    )

    first, second = (read_metrics(result.directory / "metrics.jsonl")[0] for result in (one, other))
    assert first["samples"] == second["samples"]
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-6)
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-6)


def test_a_torn_line_of_metrics_is_closed(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole.parents[2], tmp_path / "copy")
    metrics = next((tmp_path / "copy").rglob("metrics.jsonl"))
    with metrics.open("a") as file:
        file.write('{"kind":"step","step":7,"lo')

    train(tmp_path / "copy", "training.max_steps=7")

    lines = metrics.read_text().splitlines()
    assert sum(not _is_json(line) for line in lines) == 1
    assert [row["step"] for row in read_metrics(metrics)] == [1, 2, 3, 4, 5, 6, 7]


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_run_waits_for_data_that_another_is_preparing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "so it begins"}\n' * 20)
    source = f"{{path: {tmp_path / 'a.jsonl'}, weight: 1}}"
    (tmp_path / "own.yaml").write_text(f"name: own\nsources: {{a: {source}}}\n")
    there = tmp_path / "shards"
    there.mkdir()
    config = load_config([*SMALL, f"data.config_name={tmp_path / 'own.yaml'}", f"data.directory={there}"])
    found: list[PreparedData] = []
    is_waiting = threading.Event()
    monkeypatch.setattr("wrinklefree.training.data.time.sleep", lambda seconds: is_waiting.set())
    waiting = threading.Thread(target=lambda: found.append(prepare_data(config)))

    with lock(there):
        waiting.start()
        assert is_waiting.wait(timeout=60)
        assert not (there / "a").exists()
    waiting.join(timeout=60)

    assert all((path / "manifest.json").is_file() for path in found[0].directories.values())


def test_an_allowed_batch_size_need_not_divide_what_was_read(tmp_path: Path) -> None:
    train(tmp_path, "training.batch_size=1", "training.gradient_accumulation_steps=3", "training.max_steps=3")

    result = train(
        tmp_path,
        "training.batch_size=4",
        "training.gradient_accumulation_steps=1",
        "training.max_steps=5",
        "training.resume.allow=[training.batch_size,training.gradient_accumulation_steps]",
    )

    samples = [row["samples"] for row in read_metrics(result.directory / "metrics.jsonl")]
    assert [sample for step in samples for sample in step] == list(range(3 * 3 + 2 * 4))
