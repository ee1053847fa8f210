"""The contract in numbers worked out by hand, by the papers' formulas in float64, and across threads and
compilers.
"""

import math

import pytest
import torch

from bitnet_arch.quant import (
    EPS,
    dequantize_activations,
    quantize_activations,
    quantize_weight,
    ternary,
    weight_scale,
)


def test_a_weight_worked_out_by_hand() -> None:
    weight = torch.tensor([[0.5, -0.25], [0.125, -1.125]])  # mean |W| = 0.5, exact in binary

    codes, scale = quantize_weight(weight)

    assert scale.item() == 0.5
    # -0.25/0.5 = -0.5 is a tie and goes to the even 0; -2.25 is clipped.
    assert codes.tolist() == [[1, 0], [0, -1]]
    assert ternary(weight).tolist() == [[0.5, 0.0], [0.0, -0.5]]


def test_activations_worked_out_by_hand() -> None:
    q, absmax = quantize_activations(torch.tensor([[127.0, -63.5, 1.0], [2.54, 0.0, -2.54]]))

    assert q.tolist() == [[127, -64, 1], [127, 0, -127]]
    assert absmax.flatten().tolist() == pytest.approx([127.0, 2.54])


def test_all_zero_inputs_stay_zero() -> None:
    codes, scale = quantize_weight(torch.zeros(3, 5))
    q, absmax = quantize_activations(torch.zeros(2, 5))

    assert not codes.any()
    assert not q.any()
    assert scale.item() == pytest.approx(EPS)
    assert absmax.flatten().tolist() == pytest.approx([EPS, EPS])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scale_follow_the_papers_formula_in_float64(dtype: torch.dtype) -> None:
    weight = torch.randn(96, 40, generator=torch.Generator().manual_seed(3)).to(dtype)

    codes, scale = quantize_weight(weight)

    exact = weight.double().abs().mean()
    # Within one fp32 rounding of the exact mean (each partial sum of 40 terms adds a few).
    assert abs(scale.double() / exact - 1) < 4 * torch.finfo(torch.float32).eps
    expected = (weight.double() / scale.double()).round().clamp(-1, 1)
    assert torch.equal(codes.double(), expected)


def test_the_scale_is_the_float64_sum_of_fp32_row_sums() -> None:
    weight = torch.randn(33, 70, generator=torch.Generator().manual_seed(4))

    expected = sum(float(row.abs().sum()) for row in weight) / weight.numel()

    assert weight_scale(weight).item() == torch.tensor(expected, dtype=torch.float64).float().item()


def test_codes_do_not_depend_on_threads_or_the_compiler() -> None:
    compiled = torch.compile(quantize_weight, backend="aot_eager", dynamic=True)
    threads = torch.get_num_threads()
    try:
        for seed in range(40):
            generator = torch.Generator().manual_seed(seed)
            weight = torch.randn(191 + seed, 320, generator=generator) * 0.02
            torch.set_num_threads(1)
            one = quantize_weight(weight)
            torch.set_num_threads(2)
            two = quantize_weight(weight)
            graph = compiled(weight)

            for other in (two, graph):
                assert torch.equal(one.scale, other.scale)
                assert torch.equal(one.codes, other.codes)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_codes_do_not_depend_on_the_generated_kernels() -> None:
    compiled = torch.compile(quantize_weight, dynamic=True)
    for seed in range(20):
        weight = torch.randn(190 + seed, 320, generator=torch.Generator().manual_seed(seed)) * 0.02
        eager, graph = quantize_weight(weight), compiled(weight)
        assert torch.equal(eager.scale, graph.scale)
        assert torch.equal(eager.codes, graph.codes)


def test_requantising_a_ternary_weight_shrinks_its_scale_by_the_share_of_zeros() -> None:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(5))

    first = quantize_weight(weight)
    second = quantize_weight(ternary(weight))

    share_of_zeros = float((first.codes == 0).double().mean())
    assert torch.equal(first.codes, second.codes)
    assert second.scale.item() == pytest.approx(first.scale.item() * (1 - share_of_zeros), rel=1e-6)
    assert share_of_zeros == pytest.approx(0.310, abs=0.03)  # a Gaussian: P(|w| < 0.5·E|w|)


def test_quantising_activations_twice_changes_nothing() -> None:
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(6))

    q, absmax = quantize_activations(x)
    again, _ = quantize_activations(dequantize_activations(q, absmax))

    assert torch.equal(q, again)


def test_activation_values_are_within_half_a_step() -> None:
    x = torch.randn(9, 50, generator=torch.Generator().manual_seed(7))

    q, absmax = quantize_activations(x)

    error = (dequantize_activations(q, absmax) - x).abs().amax(-1, keepdim=True)
    assert (error <= absmax / 254 * (1 + 1e-5)).all()
    assert int(q.min()) >= -127


def test_tokens_are_quantised_independently() -> None:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(8))
    louder = x.clone()
    louder[2] *= 100

    (q, absmax), (q_louder, absmax_louder) = quantize_activations(x), quantize_activations(louder)

    others = [0, 1, 3, 4]
    assert torch.equal(q[others], q_louder[others])
    assert torch.equal(absmax[others], absmax_louder[others])


def test_quantisation_commutes_with_a_power_of_two() -> None:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(9))

    q, absmax = quantize_activations(x)
    q_scaled, absmax_scaled = quantize_activations(4 * x)

    assert torch.equal(q, q_scaled)
    assert torch.equal(absmax_scaled, 4 * absmax)


def test_bf16_activations_are_quantised_with_fp32_arithmetic() -> None:
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(10)).bfloat16()

    q, absmax = quantize_activations(x)
    wide_q, wide_absmax = quantize_activations(x.float())

    assert torch.equal(q, wide_q)
    assert torch.equal(absmax, wide_absmax)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_number_stays_visible_in_the_scales(bad: float) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = bad

    assert not math.isfinite(quantize_weight(x).scale.item())
    assert quantize_activations(x)[1].isfinite().flatten().tolist() == [True, False, True]
