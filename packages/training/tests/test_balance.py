"""How strongly objectives pull: measured against autograd, balanced, warned of, and exact after a kill."""

import json
import logging
import math
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bitnet_arch.testing import tiny_llama
from data_handler import Batch
from durable import UserError
from wrinklefree.config import load_config
from wrinklefree.objectives import create_objective_manager
from wrinklefree.objectives.balance import BalanceConfig, balanced_scales, gradient_norms
from wrinklefree.run import run
from wrinklefree.runs import read_metrics
from wrinklefree.teachers.local import LocalTeacher

SMALL = [
    "model=tiny_llama",
    "data=demo",
    "training=base",
    "training.max_seq_length=32",
    "training.batch_size=2",
    "training.gradient_accumulation_steps=1",
    "training.validation.num_batches=0",
    "training.objectives.logits_distill={weight: 40.0}",
]


def test_norms_are_those_of_autograd_and_leave_gradients_alone() -> None:
    student, teacher = tiny_llama(), tiny_llama(seed=1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 500, (2, 16), generator=generator)
    places = torch.arange(16).expand(2, 16)
    zeros = torch.zeros(2, 16, dtype=torch.int64)
    batch = Batch(ids, ids, places, zeros, zeros[:, 0], torch.arange(2))
    manager = create_objective_manager({"continue_pretrain": {}, "logits_distill": {"weight": 7.0}})
    parameters = list(student.parameters())
    parameters[0].grad = torch.ones_like(parameters[0])

    norms = gradient_norms(manager, student, LocalTeacher(teacher), batch)

    logits, taught = student(ids).logits[:, :-1].flatten(0, 1), teacher(ids).logits[:, :-1].flatten(0, 1)
    means = {
        "continue_pretrain": F.cross_entropy(logits, ids[:, 1:].flatten()),
        "logits_distill": F.kl_div(
            logits.log_softmax(-1), taught.log_softmax(-1), log_target=True, reduction="batchmean"
        ),
    }
    for name, mean in means.items():
        found = torch.autograd.grad(mean, parameters, retain_graph=True)
        expected = torch.cat([each.flatten() for each in found]).norm()
        assert norms[name] == pytest.approx(float(expected), rel=1e-4)
    assert torch.equal(parameters[0].grad, torch.ones_like(parameters[0]))
    assert all(parameter.grad is None for parameter in parameters[1:])


def test_gradients_of_one_objective_are_gone_before_those_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual, alive = torch.autograd.grad, []
    earlier: list[weakref.ref[torch.Tensor]] = []

    def grad(*arguments: Any, **options: Any) -> Any:
        alive.append(sum(each() is not None for each in earlier))
        found = usual(*arguments, **options)
        earlier.extend(weakref.ref(each) for each in found if each is not None)
        return found

    monkeypatch.setattr(torch.autograd, "grad", grad)
    ids = torch.arange(16).reshape(1, 16) + 5
    places, zeros = ids - 5, torch.zeros_like(ids)
    batch = Batch(ids, ids, places, zeros, zeros[:, 0], torch.zeros(1, dtype=torch.int64))
    manager = create_objective_manager({"continue_pretrain": {}, "logits_distill": {}})

    gradient_norms(manager, tiny_llama(), LocalTeacher(tiny_llama(seed=1)), batch)

    assert alive == [0, 0]


def test_factors_make_each_pull_the_same_and_move_half_the_way() -> None:
    first = balanced_scales({"continue_pretrain": 2.0, "dlm": 8.0}, {})
    assert first == {"continue_pretrain": 1.0, "dlm": 0.25}
    assert balanced_scales({"continue_pretrain": 2.0, "dlm": 4.0}, first)["dlm"] == pytest.approx(0.375)
    assert balanced_scales({"dlm": 4.0, "tcs_distill": 0.0}, {}) == {"dlm": 1.0}


def test_a_measurement_that_says_nothing_leaves_factors_that_can_be_used() -> None:
    before = {"continue_pretrain": 1.0, "dlm": 0.25}
    for norm in (math.inf, math.nan):
        assert balanced_scales({"continue_pretrain": norm, "dlm": 8.0}, before) == before
        assert balanced_scales({"continue_pretrain": 2.0, "dlm": norm}, {}) == {"continue_pretrain": 1.0}
    # A student that is its teacher, but for the teacher's rounding to bf16.
    assert balanced_scales({"continue_pretrain": 2.8, "logits_distill": 7e-4}, {})["logits_distill"] == 100.0


def test_the_measurement_computes_in_the_precision_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def measured(*arguments: Any) -> dict[str, float]:
        seen.append(torch.is_autocast_enabled("cpu"))
        return gradient_norms(*arguments)

    monkeypatch.setattr("wrinklefree.lightning.callbacks.balance.gradient_norms", measured)
    wanted = ["training.max_steps=1", "training.checkpoint.save_at_end=false", f"output_dir={tmp_path}"]
    run(load_config([*SMALL, *wanted, "training.precision=bf16"]))

    assert seen == [True]


def rows(directory: Path, kind: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(directory: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(directory / "metrics.jsonl")]


def test_measuring_changes_no_bit_and_names_a_term_that_drowns_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = [*SMALL, "training.max_steps=4", "model.attention_dropout=0.1"]
    silent = run(load_config([*wanted, f"output_dir={tmp_path / 'a'}", "training.balance.interval=null"]))
    with caplog.at_level(logging.WARNING):
        measured = run(
            load_config(
                [
                    *wanted,
                    f"output_dir={tmp_path / 'b'}",
                    "training.balance.interval=1",
                    "training.balance.warn_steps=2",
                ]
            )
        )

    losses = [
        [row["loss"] for row in read_metrics(each.directory / "metrics.jsonl")] for each in (silent, measured)
    ]
    assert losses[0] == losses[1]
    found = rows(measured.directory, "gradients")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert rows(silent.directory, "gradients") == []
    for row in found:
        norms, ratios = row["norms"], row["ratios"]
        assert ratios["logits_distill"] == pytest.approx(  # type: ignore[index]
            40 * norms["logits_distill"] / norms["continue_pretrain"]  # type: ignore[index]
        )
    strong = all(row["ratios"]["logits_distill"] > 10 for row in found)  # type: ignore[index]
    assert strong == ("lower training.objectives.logits_distill.weight (now 40)" in caplog.text)


def test_balanced_weights_are_shares_of_gradient_and_come_back_after_a_stop(tmp_path: Path) -> None:
    wanted = [
        *SMALL,
        "training.balance={mode: gradnorm, interval: 2}",
        "training.checkpoint.save_interval=3",
    ]
    whole = run(load_config([*wanted, "training.max_steps=5", f"output_dir={tmp_path / 'whole'}"]))

    first = rows(whole.directory, "gradients")[0]
    assert first["ratios"]["logits_distill"] == pytest.approx(40.0)  # type: ignore[index]
    scales = [row["scales"]["logits_distill"] for row in rows(whole.directory, "gradients")]  # type: ignore[index]
    assert len(set(scales)) == len(scales) == 3
    for row, step in zip(read_metrics(whole.directory / "metrics.jsonl"), range(5), strict=True):
        factor = scales[step // 2]
        expected = row["losses"]["continue_pretrain"] + 40 * factor * row["losses"]["logits_distill"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)

    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "whole", copy)
    stage = next((copy / "checkpoints").glob("*/*"))
    for name in ("final", "step_000005"):
        shutil.rmtree(stage / "checkpoints" / name, ignore_errors=True)
    resumed = run(load_config([*wanted, "training.max_steps=5", f"output_dir={copy}"]))
    losses = [
        [row["loss"] for row in read_metrics(each.directory / "metrics.jsonl")] for each in (whole, resumed)
    ]
    assert losses[0] == losses[1]
    events = rows(resumed.directory, "event")
    assert any(row["event"] == "resumed" and row["step"] == 3 for row in events)


def test_what_cannot_be_is_one_line() -> None:
    with pytest.raises(UserError, match=r"training\.balance\.interval: is needed"):
        BalanceConfig(mode="gradnorm", interval=None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="gradnorm balances two objectives"):
        load_config(["model=tiny_llama", "training=base", "training.balance.mode=gradnorm"])
