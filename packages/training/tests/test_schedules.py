"""Learning rates and weight decay against formulas, and what does not fit into a run."""

import math

import pytest
import torch
from torch import nn

from durable import UserError
from wrinklefree.optimizers.config import DecayType, OptimizerConfig, SchedulerConfig, SchedulerType
from wrinklefree.optimizers.schedule import (
    apply_schedule,
    learning_rate_factor,
    warmup_steps,
    weight_decay_at,
)

WSD = SchedulerType.wsd
CONSTANT = SchedulerType.constant


def test_wsd_warms_up_stays_and_goes_down_in_a_line() -> None:
    config = SchedulerConfig(type=WSD, warmup_steps=100, decay_ratio=0.2)

    factors = [learning_rate_factor(step, 1000, config) for step in range(1001)]

    assert factors[:100] == [(step + 1) / 100 for step in range(100)]
    assert factors[0] == 0.01
    assert factors[100:801] == [1.0] * 701
    assert factors[800:] == pytest.approx([(1000 - step) / 200 for step in range(800, 1001)])
    assert factors[999] > 0
    assert factors[1000] == 0


@pytest.mark.parametrize("minimum", [0.0, 0.1])
def test_wsd_goes_down_along_a_cosine(minimum: float) -> None:
    config = SchedulerConfig(
        warmup_steps=0, decay_ratio=0.5, decay_type=DecayType.cosine, min_lr_ratio=minimum
    )

    factors = [learning_rate_factor(step, 80, config) for step in range(81)]

    expected = [minimum + (1 - minimum) * (1 + math.cos(math.pi * step / 40)) / 2 for step in range(41)]
    assert factors[:41] == [1.0] * 41
    assert factors[40:] == pytest.approx(expected)


@pytest.mark.parametrize("kind", [SchedulerType.cosine, SchedulerType.linear])
def test_cosine_and_linear_go_down_from_the_peak_to_the_minimum(kind: SchedulerType) -> None:
    config = SchedulerConfig(type=kind, warmup_steps=10, min_lr_ratio=0.1)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs: torch.optim.lr_scheduler.LRScheduler
    if kind is SchedulerType.cosine:
        theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.1)
    else:
        theirs = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=50)

    for step in range(10, 60):
        assert learning_rate_factor(step, 60, config) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()

    assert learning_rate_factor(60, 60, config) == pytest.approx(0.1)
    assert learning_rate_factor(70, 60, config) == pytest.approx(0.1)


def test_constant_stays_at_the_peak_after_warm_up() -> None:
    config = SchedulerConfig(type=CONSTANT, warmup_steps=4, min_lr_ratio=0.5)

    factors = [learning_rate_factor(step, 8, config) for step in range(8)]

    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("total", "expected"), [(1, 0), (9, 0), (10, 1), (100, 10), (5500, 550), (38146, 550)]
)
def test_a_warm_up_that_nobody_wrote_is_a_share_of_the_run_with_a_limit(total: int, expected: int) -> None:
    assert warmup_steps(total, SchedulerConfig()) == expected


def test_a_warm_up_that_nobody_wrote_ends_where_the_decay_begins() -> None:
    assert warmup_steps(100, SchedulerConfig(warmup_share=0.9, decay_ratio=0.2)) == 80


@pytest.mark.parametrize("kind", list(SchedulerType))
@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_defaults_hold_for_runs_of_any_length(kind: SchedulerType, total: int) -> None:
    for config in (
        SchedulerConfig(type=kind),
        SchedulerConfig(type=kind, warmup_share=1.0, decay_ratio=1.0, warmup_limit_steps=10_000),
    ):
        factors = [learning_rate_factor(step, total, config) for step in range(total)]

        assert all(0 < factor <= 1 for factor in factors)


def test_shares_that_are_no_exact_floats_are_whole_steps() -> None:
    # 0.29 · 100 is 28.999999999999996.
    assert warmup_steps(100, SchedulerConfig(type=CONSTANT, warmup_share=0.29)) == 29


@pytest.mark.parametrize(
    ("config", "total", "text"),
    [
        (
            SchedulerConfig(warmup_steps=81, decay_ratio=0.2),
            100,
            r"81 steps of warm-up and 20 of decay in training\.max_steps=100\); fix: give at most 80",
        ),
        (
            SchedulerConfig(type=SchedulerType.cosine, warmup_steps=101),
            100,
            r"101 steps of warm-up in training\.max_steps=100\); fix: give at most 100",
        ),
    ],
)
def test_a_warm_up_that_a_person_wrote_and_that_does_not_fit_is_refused(
    config: SchedulerConfig, total: int, text: str
) -> None:
    with pytest.raises(UserError, match=text):
        learning_rate_factor(0, total, config)


def test_a_warm_up_that_just_fits_is_accepted() -> None:
    config = SchedulerConfig(warmup_steps=80, decay_ratio=0.2)

    assert learning_rate_factor(79, 100, config) == 1.0
    assert learning_rate_factor(99, 100, config) == pytest.approx(0.05)


def test_every_group_follows_its_own_peak() -> None:
    optimizer = torch.optim.AdamW(
        [
            {"params": [nn.Parameter(torch.zeros(2))], "lr": 0.02},
            {"params": [nn.Parameter(torch.zeros(3))], "lr": 5e-5},
        ]
    )

    for factor in (0.5, 1.0, 0.1):
        apply_schedule(optimizer, factor)

        assert [group["lr"] for group in optimizer.param_groups] == [0.02 * factor, 5e-5 * factor]


def test_weight_decay_switches_for_the_groups_that_decay() -> None:
    config = OptimizerConfig(weight_decay=0.1, weight_decay_final=0.0, weight_decay_switch=0.5)
    decays = [weight_decay_at(step, 7, config) for step in range(7)]
    groups = [
        {"params": [nn.Parameter(torch.zeros(2))], "decays": True},
        {"params": [nn.Parameter(torch.zeros(3))], "decays": False, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)

    apply_schedule(optimizer, 1.0, 0.3)

    assert decays == [0.1] * 3 + [0.0] * 4
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_weight_decay_without_a_second_stage_stays() -> None:
    config = OptimizerConfig(weight_decay=0.1)

    assert [weight_decay_at(step, 4, config) for step in range(4)] == [0.1] * 4
