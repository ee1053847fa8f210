"""Weights on the bounded simplex, and updates that cannot be trusted."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_handler.influence.config import MixtureOptimizationConfig
from data_handler.influence.reweight import MixtureWeightCalculator
from data_handler.influence.simplex import project_to_bounded_simplex
from durable import UserError

BASE = {"web": 0.5, "code": 0.3, "math": 0.2, "unused": 0.0}


@settings(deadline=None)
@given(
    point=st.lists(st.floats(-5, 5), min_size=2, max_size=7),
    floor=st.floats(0, 0.14),
    ceiling=st.floats(0.5, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_other_allowed_point_is_nearer(
    point: list[float], floor: float, ceiling: float, seed: int
) -> None:
    v = np.array(point)

    found = project_to_bounded_simplex(v, floor, ceiling)

    assert abs(found.sum() - 1) < 1e-12
    assert found.min() >= floor
    assert found.max() <= ceiling
    # The projection p of v is the only point with ⟨v − p, q − p⟩ ≤ 0 for every allowed q.
    random = np.random.default_rng(seed)
    for _ in range(20):
        q = floor + (1 - floor * v.size) * random.dirichlet(np.ones(v.size))
        if q.max() <= ceiling:
            assert (v - found) @ (q - found) <= 1e-9


def test_the_projection_by_hand() -> None:
    # Without bounds 0.9, 0.5, 0 loses 0.4/2 on the first two; with the ceiling 0.6, the second gets the rest.
    np.testing.assert_allclose(project_to_bounded_simplex(np.array([0.9, 0.5, 0.0]), 0, 1), [0.7, 0.3, 0.0])
    np.testing.assert_allclose(
        project_to_bounded_simplex(np.array([0.9, 0.5, 0.0]), 0.05, 0.6), [0.6, 0.35, 0.05]
    )


def test_bounds_that_nothing_fits_between_are_refused_at_the_start() -> None:
    with pytest.raises(UserError, match="no weights fit"):
        MixtureWeightCalculator({"a": 1.0, "b": 1.0}, MixtureOptimizationConfig(max_weight=0.4))


def scores(**means: float) -> dict[str, Tensor]:
    noise = torch.linspace(-1, 1, 40, dtype=torch.float64)
    return {name: noise + mean for name, mean in means.items()}


def test_a_helpful_source_gains_a_harmful_one_loses_and_floors_hold() -> None:
    calculator = MixtureWeightCalculator(BASE)

    weights = calculator.compute_mixture_weights(BASE, scores(web=0.0, code=3.0, math=-3.0)).weights

    assert weights["code"] > 0.3
    assert weights["math"] == pytest.approx(0.05)
    assert weights["unused"] == 0.0
    assert sum(weights.values()) == pytest.approx(1, abs=1e-12)


def test_sources_that_differ_by_less_than_their_noise_stay_where_they_are() -> None:
    calculator = MixtureWeightCalculator(BASE)

    update = calculator.compute_mixture_weights(BASE, scores(web=0.0, code=0.05, math=-0.05))

    assert update.weights == pytest.approx(BASE)
    assert set(update.advantages.values()) == {0.0}


def test_weights_return_when_the_advantage_is_gone() -> None:
    calculator = MixtureWeightCalculator(BASE)
    weights = calculator.compute_mixture_weights(BASE, scores(web=0.0, code=3.0, math=-3.0)).weights

    for _ in range(60):
        weights = calculator.compute_mixture_weights(
            weights, scores(web=0.0, code=0.0, math=0.0), learning_rate=0.5
        ).weights

    assert weights == pytest.approx(BASE, abs=1e-6)


def test_the_unit_of_the_scores_does_not_matter() -> None:
    given_scores = scores(web=0.0, code=1.0, math=-1.0)
    scaled = {name: 1e-7 * values for name, values in given_scores.items()}

    one = MixtureWeightCalculator(BASE).compute_mixture_weights(BASE, given_scores).weights
    other = MixtureWeightCalculator(BASE).compute_mixture_weights(BASE, scaled).weights

    assert one == pytest.approx(other)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"math": torch.tensor([0.0, float("nan")])}, "scores of math are not finite"),
        ({"web": torch.tensor([float("inf"), 0.0])}, "scores of web are not finite"),
        ({"code": torch.tensor([1.0])}, "fewer than two scores for code"),
        ({name: torch.zeros(4) for name in ("web", "code", "math")}, "are the same"),
    ],
)
def test_scores_that_cannot_be_trusted_keep_the_old_weights_and_say_so(
    wrong: dict[str, Tensor], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    calculator = MixtureWeightCalculator(BASE)
    before = calculator.state_dict()

    update = calculator.compute_mixture_weights(BASE, scores(web=0.0, code=3.0, math=-3.0) | wrong)

    assert update.weights == BASE
    assert update.kept_because is not None
    assert reason in update.kept_because
    assert reason in caplog.text
    assert calculator.state_dict() == before


def test_one_sided_scores_keep_the_old_weights() -> None:
    update = MixtureWeightCalculator(BASE).compute_mixture_weights(BASE, scores(web=1.0))

    assert update.kept_because == "no scores for code"


def test_no_source_ever_gets_everything() -> None:
    free = MixtureOptimizationConfig(min_weight=0.0, max_weight=1.0, strength=10.0)

    update = MixtureWeightCalculator(BASE, free).compute_mixture_weights(
        BASE, scores(web=0.0, code=9.0, math=0.0)
    )

    assert update.kept_because == "code would get everything"
    assert update.weights == BASE
