"""The closed forms against what they claim: minima, monotony, and exactness at full rank."""

import pytest
import torch
from torch import Tensor

from bitnet_arch import lrc_solve
from bitnet_arch.lrc_solve import (
    InputStatistics,
    best_correction,
    objective,
    requantized,
    solve,
    ternary_value,
    truncated_svd,
)
from bitnet_arch.quant import dequantize_activations, quantize_activations, quantize_weight

N, K, T = 13, 10, 200


@pytest.fixture
def x() -> Tensor:
    """Correlated tokens with channels of different energy, like those of a trained model."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.eye(K).double() + 0.3 * torch.randn(K, K, generator=generator, dtype=torch.float64)
    return torch.randn(T, K, generator=generator, dtype=torch.float64) @ mix * torch.logspace(-0.5, 0.5, K)


@pytest.fixture
def y(x: Tensor) -> Tensor:
    q, absmax = quantize_activations(x)
    return q.double() * (absmax.double() / 127)


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def statistics(x: Tensor, y: Tensor) -> InputStatistics:
    sums = InputStatistics.empty(K)
    sums.add(x, y)
    return sums


def direct_objective(W: Tensor, hat: Tensor, M: Tensor, x: Tensor, y: Tensor) -> float:
    return float((W @ x.T - hat @ y.T - M @ x.T).square().sum())


def test_the_sums_are_those_of_all_batches_in_float64(x: Tensor, y: Tensor) -> None:
    sums = InputStatistics.empty(K)
    for part in (slice(0, 70), slice(70, T)):
        sums.add(x[part].float(), y[part].float())

    torch.testing.assert_close(sums.xy, x.float().double().T @ y.float().double())
    assert sums.num_tokens == T


def test_the_objective_from_sums_is_the_one_from_tokens(
    weight: Tensor, statistics: InputStatistics, x: Tensor, y: Tensor
) -> None:
    W, hat, M = weight.double(), ternary_value(weight), torch.randn(N, K, dtype=torch.float64)

    assert objective(W, hat, M, statistics) == pytest.approx(direct_objective(W, hat, M, x, y), rel=1e-10)


def test_the_ternary_value_is_what_the_layer_multiplies_with(weight: Tensor) -> None:
    torch.testing.assert_close(ternary_value(weight), quantize_weight(weight).value().double())


def test_step_b_is_the_reduced_rank_regression_of_the_paper(
    weight: Tensor, statistics: InputStatistics, x: Tensor, y: Tensor
) -> None:
    W, hat = weight.double(), ternary_value(weight)
    B = (W @ x.T - hat @ y.T) @ x @ torch.linalg.inv(x.T @ x)
    top = torch.linalg.eigh(B @ (x.T @ x) @ B.T).eigenvectors[:, -3:]

    U, V = best_correction(W, hat, statistics, 3)

    torch.testing.assert_close(U @ V.T, top @ top.T @ B)


@pytest.mark.parametrize("shape", [(13, 10), (7, 10)])
def test_step_b_never_raises_the_objective_whatever_was_there(
    statistics: InputStatistics, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(3)
    for rank in (1, 4, 7):
        W, old_U = (torch.randn(shape[0], n, generator=generator, dtype=torch.float64) for n in (K, rank))
        old_V = torch.randn(K, rank, generator=generator, dtype=torch.float64)
        hat = ternary_value(W)
        # From a random correction, from none, and from its own result nudged a little.
        best = best_correction(W, hat, statistics, rank)
        nudged = (best[0] + 1e-3 * old_U) @ best[1].T
        for before in (old_U @ old_V.T, torch.zeros_like(W), nudged):
            assert objective(W, hat, best[0] @ best[1].T, statistics) <= objective(W, hat, before, statistics)


def test_no_gradient_is_left_after_step_b(weight: Tensor, statistics: InputStatistics) -> None:
    W, hat = weight.double(), ternary_value(weight)
    U, V = (factor.requires_grad_() for factor in best_correction(W, hat, statistics, 3))
    error = W @ statistics.xx - hat @ statistics.xy.T - U @ V.T @ statistics.xx

    # d/dM of the objective is -2·error; by the chain rule for U and V, hence both products vanish.
    for gradient in (error @ V, error.T @ U):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-9 * float(W.norm()), rtol=0)


def test_full_rank_reproduces_the_weight_when_activations_are_exact(weight: Tensor, x: Tensor) -> None:
    sums = InputStatistics.empty(K)
    sums.add(x, x)

    U, V = best_correction(weight.double(), ternary_value(weight), sums, K)

    torch.testing.assert_close(ternary_value(weight) + U @ V.T, weight.double())


@pytest.mark.parametrize("shape", [(13, 10), (10, 13)])
def test_the_truncated_svd_is_lapacks(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix)

    U, V = truncated_svd(matrix, 4)

    torch.testing.assert_close(U @ V.T, left[:, :4] * values[:4] @ right[:4])
    torch.testing.assert_close(U.norm(dim=0), V.norm(dim=0))
    torch.testing.assert_close(U.norm(dim=0), values[:4].sqrt())


def test_without_an_error_to_correct_one_factor_stays_alive() -> None:
    U, V = truncated_svd(torch.zeros(6, 4), 2)

    assert (V == 0).all()
    torch.testing.assert_close(U.norm(dim=0), torch.ones(2, dtype=torch.float64))


def test_step_a_gives_a_latent_weight_that_quantises_to_better_codes(
    weight: Tensor, statistics: InputStatistics
) -> None:
    W, none = weight.double(), torch.zeros(N, K, dtype=torch.float64)

    latent = requantized(W, statistics, torch.float32)

    codes, scale = quantize_weight(latent)
    assert set(codes.flatten().tolist()) == {-1, 0, 1}
    torch.testing.assert_close(latent * (codes == 0), torch.zeros(N, K))
    torch.testing.assert_close(latent[codes != 0].abs().mean() * (codes != 0).float().mean(), scale)
    before = objective(W, ternary_value(weight), none, statistics)
    assert objective(W, ternary_value(latent), none, statistics) < 0.9 * before


def test_step_a_has_the_scale_that_suits_its_codes_best(weight: Tensor, statistics: InputStatistics) -> None:
    W, none = weight.double(), torch.zeros(N, K, dtype=torch.float64)
    hat = ternary_value(requantized(W, statistics, torch.float32))

    here, less, more = (objective(W, hat * factor, none, statistics) for factor in (1, 0.99, 1.01))

    assert here < less
    assert here < more


def test_step_a_leaves_what_is_ternary_already_alone(statistics: InputStatistics) -> None:
    codes = torch.randint(-1, 2, (N, K), generator=torch.Generator().manual_seed(4)).double()
    sums = InputStatistics(statistics.xx, statistics.xx, statistics.xx)

    latent = requantized(0.37 * codes, sums, torch.float64)

    # The absmean of such a weight is below its value by the share of zeros; the fit of the scale finds it.
    torch.testing.assert_close(ternary_value(latent), 0.37 * codes, rtol=1e-6, atol=1e-6)


def test_blocks_of_columns_change_nothing_in_step_a(weight: Tensor, statistics: InputStatistics) -> None:
    whole, blocks = (lrc_solve._gptq_codes(weight.double(), statistics.yy, block) for block in (K, 3))

    torch.testing.assert_close(whole, blocks)


def test_more_rounds_are_never_worse(weight: Tensor, statistics: InputStatistics) -> None:
    found = [solve(weight, statistics, 2, rounds=rounds).objective for rounds in range(5)]

    assert found == sorted(found, reverse=True)
    assert found[1] < found[0], "re-choosing codes helps here"


def test_a_round_that_makes_it_worse_is_forgotten(
    weight: Tensor, statistics: InputStatistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lrc_solve, "requantized", lambda *_: torch.randn(N, K))

    fit = solve(weight, statistics, 2, rounds=2)

    assert fit.weight is weight
    assert fit.objective == solve(weight, statistics, 2).objective


def test_without_rounds_the_weight_stays_the_given_one(weight: Tensor, statistics: InputStatistics) -> None:
    assert solve(weight, statistics, 2).weight is weight


def test_calibration_beats_the_truncated_svd_on_its_own_measure(
    weight: Tensor, statistics: InputStatistics
) -> None:
    W, hat = weight.double(), ternary_value(weight)
    U, V = truncated_svd(W - hat, 2)

    fit = solve(weight, statistics, 2)

    assert fit.objective < 0.6 * objective(W, hat, U @ V.T, statistics)


@pytest.mark.parametrize("rounds", [0, 2])
def test_channels_that_no_token_used_keep_their_weights(weight: Tensor, x: Tensor, rounds: int) -> None:
    x[:, 4] = 0
    sums = InputStatistics.empty(K)
    sums.add(x[:5], dequantize_activations(*quantize_activations(x[:5])))

    fit = solve(weight, sums.damped(), K, rounds=rounds)

    corrected = ternary_value(fit.weight) + fit.U @ fit.V.T
    torch.testing.assert_close(corrected[:, 4], weight[:, 4].double())


def test_inputs_that_are_all_zero_are_no_accident() -> None:
    sums = InputStatistics.empty(K)
    sums.add(torch.zeros(5, K), torch.zeros(5, K))

    fit = solve(torch.randn(N, K), sums.damped(), 2, rounds=1)

    assert all(bool(part.isfinite().all()) for part in (fit.U, fit.V, fit.weight))
