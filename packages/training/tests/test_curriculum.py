"""Weights of objectives over a run: what they are, what they do to it, and what is refused."""

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest

from durable import UserError
from wrinklefree.config import load_config
from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.objectives import CurriculumPhase, CurriculumScheduler
from wrinklefree.run import RunResult, run
from wrinklefree.runs import read_metrics
from wrinklefree.teachers.local import LocalTeacher

EARLIER = [
    CurriculumPhase("warmup", 0.1, {"continue_pretrain": 1.0}),
    CurriculumPhase("dlm_ramp", 0.3, {"continue_pretrain": 1.0, "dlm": 0.3}),
    CurriculumPhase("main", 0.8, {"continue_pretrain": 1.0, "dlm": 0.5}),
    CurriculumPhase("dlm_focus", 1.0, {"continue_pretrain": 0.5, "dlm": 1.0}),
]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (5, (1, 0)),
        (10, (1, 0)),
        (20, (1, 0.15)),
        (30, (1, 0.3)),
        (55, (1, 0.4)),
        (90, (0.75, 0.75)),
        (100, (0.5, 1)),
    ],
)
def test_weights_are_those_of_the_earlier_system(step: int, expected: tuple[float, float]) -> None:
    weights = CurriculumScheduler(EARLIER, 100, "linear").weights(step)

    assert (weights["continue_pretrain"], weights["dlm"]) == pytest.approx(expected)


def test_a_cosine_is_halfway_at_the_middle_and_slow_at_its_ends() -> None:
    cosine = CurriculumScheduler(EARLIER, 1000, "cosine")

    assert cosine.weights(900)["dlm"] == pytest.approx(0.75)
    assert cosine.weights(850)["dlm"] == pytest.approx(0.5 + 0.5 * (1 - 0.5**0.5) / 2)  # 1 − cos 45°


def test_steps_of_a_phase_are_its_share_of_the_run() -> None:
    step = CurriculumScheduler(EARLIER, 10, "step")

    assert [step.weights(number)["dlm"] for number in range(1, 11)] == [0, 0.3, 0.3, *[0.5] * 5, 1, 1]


SMALL = [
    "model=tiny_llama",
    "training=base",
    "training.objectives.logits_distill={weight: 0.5}",
    "data=demo",
    "training.max_seq_length=32",
    "training.batch_size=2",
    "training.gradient_accumulation_steps=1",
    "training.max_steps=4",
    "training.validation.num_batches=0",
    "training.checkpoint.save_interval=3",
]


def phases(*each: tuple[float, dict[str, float]]) -> list[str]:
    listed = [
        {"name": f"p{n}", "until": until, "objectives": weights} for n, (until, weights) in enumerate(each)
    ]
    unquoted = json.dumps(listed).replace('"', "")
    return ["training.curriculum.enabled=true", f"training.curriculum.phases={unquoted}"]


BOTH_THEN_ONE = phases(
    (0.5, {"continue_pretrain": 0.5, "logits_distill": 0.5}), (1.0, {"continue_pretrain": 2.0})
)


def train(output_dir: Path, *overrides: str) -> RunResult:
    return run(load_config([*SMALL, f"output_dir={output_dir}", *overrides]))


def test_a_run_takes_each_step_with_its_weights_and_lets_the_teacher_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers: list[Any] = []
    alive = []
    usual = WrinkleFreeLightningModule.training_step

    def training_step(self: WrinkleFreeLightningModule, *arguments: Any) -> None:
        if isinstance(self.teacher, LocalTeacher) and not teachers:
            teachers.append(weakref.ref(self.teacher.model))
        gc.collect()
        alive.append(teachers[0]() is not None)
        usual(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(WrinkleFreeLightningModule, "training_step", training_step)
        result = train(tmp_path / "whole", *BOTH_THEN_ONE)

    rows = read_metrics(result.directory / "metrics.jsonl")
    both, one = (0.5, 0.5), (2.0, 0.0)
    seen = [(w["continue_pretrain"], w["logits_distill"]) for w in (row["objective_weights"] for row in rows)]
    assert seen == [both, both, one, one]
    for row, weights in zip(rows, seen, strict=True):
        parts = row["losses"]
        expected = weights[0] * parts["continue_pretrain"] + weights[1] * parts.get("logits_distill", 0)
        assert row["loss"] == pytest.approx(expected, rel=1e-6)
    assert alive == [True, True, False, False]
    events = read_metrics(result.directory / "metrics.jsonl", kind="event")
    assert [(event["event"], event["step"]) for event in events] == [("teacher_freed", 3)]

    again = train(tmp_path / "again", *BOTH_THEN_ONE, "training.checkpoint.save_at_end=false")
    checkpoint = again.directory / "checkpoints" / "step_000003"
    resumed = train(tmp_path / "resumed", *BOTH_THEN_ONE, f"training.resume.checkpoint_path={checkpoint}")
    last = read_metrics(resumed.directory / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in last] == [(4, rows[-1]["loss"])]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (phases((0.5, {"continue_pretrain": 1}), (0.5, {"continue_pretrain": 1})), "must ascend"),
        (phases((0.5, {"continue_pretrain": 1})), "end at 1"),
        (phases((1.0, {"continue_pretrain": 0})), "p0: nothing would be trained"),
        (phases((1.0, {"continue_pretrain": -1})), "continue_pretrain: must be a number, 0 or more"),
        (phases((1.0, {"continue_pretrian": 1})), "did you mean 'continue_pretrain'"),
        (phases((1.0, {"dlm": 1})), "not among training.objectives"),
        (
            [*phases((1.0, {"logits_distill": 1})), "training.objectives.logits_distill.enabled=false"],
            "logits_distill is switched off",
        ),
        (["training.curriculum.enabled=true"], "there are none"),
        (
            [*phases((1.0, {"continue_pretrain": 1})), "training.objectives.continue_pretrain.weight=2"],
            "phases say how much it counts",
        ),
        ([*BOTH_THEN_ONE, "training.curriculum.interpolation=sudden"], "step | linear | cosine"),
    ],
)
def test_a_curriculum_that_does_not_hold_is_one_line(given: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(["training=base", *given])

    assert caught.value.exit_code == 2
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def one_source(path: Path, name: str, word: str) -> Path:
    """A data config of one source that says one word."""
    lines = [json.dumps({"text": f"{word} {number} " * 12}) for number in range(300)]
    (path / f"{name}.jsonl").write_text("\n".join(lines))
    config = path / f"{name}.yaml"
    source = f"{{format: jsonl, path: {path}/{name}.jsonl, probe_one_in: 20}}"
    config.write_text(f"name: {name}\nsources:\n  {word}: {source}\n")
    return config


def test_a_phase_reads_its_own_data_and_so_does_a_resumed_run(tmp_path: Path) -> None:
    first, second = one_source(tmp_path, "first", "apples"), one_source(tmp_path, "second", "pears")
    listed = [
        {"until": 0.5, "objectives": {"continue_pretrain": 1.0}},
        {"until": 1.0, "objectives": {"continue_pretrain": 1.0}, "data": str(second)},
    ]
    wanted = [
        "training.curriculum.enabled=true",
        f"training.curriculum.phases={json.dumps(listed).replace(chr(34), '')}",
        f"data.config_name={first}",
        "data.window_samples=4",
        "training.max_steps=8",
        f"data.directory={tmp_path / 'data'}",
    ]

    whole = train(tmp_path / "whole", *wanted)

    rows = read_metrics(whole.directory / "metrics.jsonl")
    # The phase begins with step 5, when 10 samples are read; its window with the 12th, in step 7.
    assert [row["weights"]["pears"] for row in rows] == [0, 0, 0, 0, 0, 0, 1, 1]
    lines = [json.loads(line) for line in (whole.directory / "metrics.jsonl").read_text().splitlines()]
    (event,) = [line for line in lines if line.get("event") == "data_phase"]
    assert (event["step"], event["from_sample"], event["data"]) == (5, 12, str(second))

    for killed_after in (3, 6):
        copy = tmp_path / f"after {killed_after}"
        shutil.copytree(tmp_path / "whole", copy)
        checkpoints = next(copy.glob("checkpoints/*/*")) / "checkpoints"
        for path in checkpoints.iterdir():
            if path.name == "final" or int(path.name.removeprefix("step_")) > killed_after:
                shutil.rmtree(path)
        resumed = read_metrics(train(copy, *wanted).directory / "metrics.jsonl")
        assert [row["loss"] for row in resumed] == [row["loss"] for row in rows]
        assert [row["weights"] for row in resumed] == [row["weights"] for row in rows]


def test_the_first_step_reads_the_data_of_its_own_phase(tmp_path: Path) -> None:
    first, second = one_source(tmp_path, "first", "apples"), one_source(tmp_path, "second", "pears")
    listed = [
        {"until": until, "objectives": {"continue_pretrain": 1.0}, "data": str(config)}
        for until, config in ((0.0, first), (1.0, second))
    ]
    result = train(
        tmp_path / "out",
        "training.curriculum.enabled=true",
        f"training.curriculum.phases={json.dumps(listed).replace(chr(34), '')}",
        "training.max_steps=2",
        f"data.directory={tmp_path / 'data'}",
    )

    weights = [row["weights"] for row in read_metrics(result.directory / "metrics.jsonl")]
    assert [each["pears"] for each in weights] == [1, 1]


def test_influence_moves_the_weights_of_the_present_phase_alone(tmp_path: Path) -> None:
    listed = [
        {"until": 0.5, "objectives": {"continue_pretrain": 1.0}},
        {"until": 1.0, "objectives": {"continue_pretrain": 1.0}, "data": "demo"},
    ]
    only = one_source(tmp_path, "only", "plums")
    result = train(
        tmp_path / "out",
        "training.curriculum.enabled=true",
        f"training.curriculum.phases={json.dumps(listed).replace(chr(34), '')}",
        f"data.config_name={only}",
        "data.window_samples=8",
        "training.max_steps=18",
        "training.influence={enabled: true, update_interval: 2, warmup_steps: 0, learning_rate: 1.0, "
        "noise: 0.0, num_samples: 3, min_weight: 0.15}",
    )

    weights = [row["weights"] for row in read_metrics(result.directory / "metrics.jsonl")]
    assert all(each["plums"] == 1 for each in weights[:12])
    assert all(each["plums"] == 0 for each in weights[12:])
    assert len({tuple(each.values()) for each in weights[12:]}) > 1
