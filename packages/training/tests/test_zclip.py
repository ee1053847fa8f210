"""ZClip against the paper's formulas, and what reaches the gradients."""

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from wrinklefree.optimizers.config import GradientClippingConfig, ZClipConfig, ZClipMode
from wrinklefree.optimizers.zclip import NormStatistics, ZClip, after_norm, total_norm

OFFICIAL = ZClipConfig(enabled=True)
EARLIER = ZClipConfig(
    enabled=True, z_threshold=3.0, ema_decay=0.99, mode=ZClipMode.percentile, min_limit=0.01
)
WARM = NormStatistics(mean=2.0, variance=0.25, is_warm=True)


def test_the_defaults_are_those_of_the_official_code() -> None:
    assert (OFFICIAL.ema_decay, OFFICIAL.z_threshold, OFFICIAL.warmup_steps) == (0.97, 2.5, 25)
    assert (OFFICIAL.mode, OFFICIAL.clip_factor, OFFICIAL.skip_update_on_spike) == ("adaptive", 1.0, False)
    assert GradientClippingConfig().max_norm == 1.0


def test_statistics_start_from_the_norms_of_the_warm_up() -> None:
    statistics, norms = NormStatistics(), [0.5 + 0.1 * step for step in range(25)]

    for norm in norms:
        assert not statistics.is_warm
        statistics, limit, _ = after_norm(statistics, norm, OFFICIAL)
        assert limit == math.inf

    assert statistics.is_warm
    assert statistics.mean == pytest.approx(torch.tensor(norms).double().mean().item(), rel=1e-6)
    variance = torch.tensor(norms).double().var(unbiased=False).item()
    assert statistics.variance == pytest.approx(variance, rel=1e-6)
    assert statistics.warmup == ()


def test_a_usual_norm_moves_the_statistics_and_is_not_limited() -> None:
    after, limit, z = after_norm(WARM, 2.6, OFFICIAL)

    mean = 0.97 * 2.0 + 0.03 * 2.6
    assert limit == math.inf
    assert z == pytest.approx(0.6 / 0.5, rel=1e-5)
    assert after.mean == pytest.approx(mean)
    assert after.variance == pytest.approx(0.97 * 0.25 + 0.03 * (2.6 - mean) ** 2)


@pytest.mark.parametrize("deviations", [2.6, 5.0, 40.0])
def test_a_spike_is_limited_the_more_the_larger_it_is(deviations: float) -> None:
    after, limit, z = after_norm(WARM, 2.0 + deviations * 0.5, OFFICIAL)

    expected = 2.0 + 6.25 * 0.5 / deviations
    mean = 0.97 * 2.0 + 0.03 * expected
    assert z == pytest.approx(deviations, rel=1e-5)
    assert limit == pytest.approx(expected, rel=1e-5)
    # What was clipped is what the statistics see.
    assert after.mean == pytest.approx(mean)
    assert after.variance == pytest.approx(0.97 * 0.25 + 0.03 * (expected - mean) ** 2, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mode": "percentile"}, 2.0 + 2.5 * 0.5),
        ({"mode": "mean"}, 2.0),
        ({"clip_factor": 0.5}, 0.5 * (2.0 + 6.25 * 0.5 / 10)),
        ({"clip_factor": 0.5, "min_limit": 1.9}, 1.9),
        ({"z_threshold": 4.0}, 2.0 + 16 * 0.5 / 10),
        ({"z_threshold": 11.0}, math.inf),
    ],
)
def test_modes_and_factors_change_the_limit_of_a_spike(settings: dict[str, Any], expected: float) -> None:
    _, limit, _ = after_norm(WARM, 2.0 + 10 * 0.5, ZClipConfig(**settings))

    assert limit == pytest.approx(expected, rel=1e-5)


def test_the_earlier_settings_clip_to_three_deviations_of_the_norms_before() -> None:
    statistics = NormStatistics()
    norms = [1.0 + 0.2 * math.sin(step) for step in range(25)]
    for norm in norms:
        statistics, _, _ = after_norm(statistics, norm, EARLIER)
    known = torch.tensor(norms).double()

    _, limit, _ = after_norm(statistics, 10.0, EARLIER)

    assert limit == pytest.approx(known.mean().item() + 3 * known.std(unbiased=False).item(), rel=1e-5)


def test_constant_norms_are_never_clipped() -> None:
    zclip = ZClip(GradientClippingConfig(max_norm=None, zclip=OFFICIAL))

    assert not any(zclip.observe(0.7).was_clipped for _ in range(200))


@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("statistics", [NormStatistics(warmup=(1.0,)), WARM])
def test_a_norm_that_is_no_number_changes_nothing(statistics: NormStatistics, norm: float) -> None:
    after, limit, z = after_norm(statistics, norm, OFFICIAL)

    assert (after, limit, z) == (statistics, math.inf, 0.0)


def test_statistics_can_leave_spikes_out() -> None:
    config = ZClipConfig(skip_update_on_spike=True)

    after_spike, limit, _ = after_norm(WARM, 9.0, config)
    after_usual, _, _ = after_norm(WARM, 2.1, config)

    assert limit < 9.0
    assert after_spike == WARM
    assert after_usual != WARM


def test_gradients_are_scaled_to_the_smaller_of_both_limits() -> None:
    config = GradientClippingConfig(max_norm=2.2, zclip=OFFICIAL)
    zclip = ZClip(config)
    zclip.statistics = WARM
    parameters = _with_gradients(norm=7.0)

    clipped = zclip.clip(parameters)

    # The adaptive limit is 2 + 6.25 · 0.5 / 10 = 2.3125.
    assert clipped.norm == pytest.approx(7.0, rel=1e-6)
    assert clipped.limit == 2.2
    assert clipped.was_clipped
    assert total_norm(parameters).item() == pytest.approx(2.2, rel=1e-5)


@pytest.mark.parametrize(("norm", "expected"), [(0.9, 0.9), (5.0, 1.0)])
def test_a_fixed_norm_is_what_torch_makes_of_it(norm: float, expected: float) -> None:
    parameters, theirs = _with_gradients(norm=norm), _with_gradients(norm=norm)

    clipped = ZClip(GradientClippingConfig(max_norm=1.0)).clip(parameters)
    nn.utils.clip_grad_norm_(theirs, 1.0)

    assert clipped.norm == pytest.approx(norm, rel=1e-6)
    assert total_norm(parameters).item() == pytest.approx(expected, rel=1e-5)
    for mine, other in zip(parameters, theirs, strict=True):
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None and other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad)


def test_without_any_limit_gradients_keep_their_bits() -> None:
    parameters = _with_gradients(norm=1e6)
    before = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]

    clipped = ZClip(GradientClippingConfig(max_norm=None)).clip(parameters)

    assert not clipped.was_clipped
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    assert all(torch.equal(was, now) for was, now in zip(before, found, strict=True))


def test_gradients_that_are_not_finite_are_left_to_whoever_skips_the_step() -> None:
    zclip = ZClip(GradientClippingConfig(max_norm=1.0, zclip=OFFICIAL))
    parameters = _with_gradients(norm=3.0)
    assert parameters[0].grad is not None
    parameters[0].grad[0] = math.inf

    clipped = zclip.clip(parameters)

    assert clipped.norm == math.inf
    assert zclip.statistics == NormStatistics()
    assert parameters[1].grad is not None
    assert not parameters[1].grad.eq(0).any()


def test_a_norm_that_is_known_is_taken_as_it_is() -> None:
    parameters = _with_gradients(norm=4.0)

    clipped = ZClip(GradientClippingConfig(max_norm=1.0)).clip(parameters, torch.tensor(8.0))

    assert clipped.norm == 8.0
    assert total_norm(parameters).item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("num_norms", [0, 7, 40])
def test_the_state_goes_through_json_to_the_bit(num_norms: int) -> None:
    config = GradientClippingConfig(max_norm=None, zclip=OFFICIAL)
    zclip, other = ZClip(config), ZClip(config)
    norms = [1 + 0.3 * math.sin(3 * step) + 5 * (step % 17 == 16) for step in range(80)]
    for norm in norms[:num_norms]:
        zclip.observe(norm)

    other.load_state_dict(json.loads(json.dumps(zclip.state_dict(), allow_nan=False)))

    assert [zclip.observe(norm) for norm in norms] == [other.observe(norm) for norm in norms]


def _with_gradients(*, norm: float) -> list[nn.Parameter]:
    """Three parameters whose gradients have this norm together, and one without a gradient."""
    generator = torch.Generator().manual_seed(3)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3,), (2, 5), (4, 1), (6,))]
    gradients = [torch.randn(parameter.shape, generator=generator) for parameter in parameters[:3]]
    size = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    for parameter, gradient in zip(parameters, gradients, strict=False):
        parameter.grad = gradient * (norm / size)
    return parameters
