"""BitLinear against the textbook layer in float64, written here from the paper (arXiv 2402.17764)."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_arch import gemm
from bitnet_arch.bitlinear import (
    BitLinear,
    BitLinearNoActivationQuant,
    set_backward_dtype,
    set_quant_amount,
    set_sparsity,
    set_subln_amount,
)
from bitnet_arch.sparsity import Sparsity
from bitnet_arch.subln import SubLN
from durable import UserError


def textbook(x: Tensor, weight: Tensor, *, amount: float = 1.0, activation_amount: float = 1.0) -> Tensor:
    """The paper's layer with the detach trick, in the dtype given."""
    scale = weight.abs().mean().clamp(min=1e-5)
    weight_q = (weight / scale).round().clamp(-1, 1) * scale
    absmax = x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    x_q = (x * (127 / absmax)).round() * absmax / 127
    x = x + activation_amount * (x_q - x).detach()
    weight = weight + amount * (weight_q - weight).detach()
    return F.linear(x, weight)


def layer_and_input(in_features: int = 40, out_features: int = 24) -> tuple[BitLinear, Tensor]:
    torch.manual_seed(0)
    layer = BitLinear(in_features, out_features)
    return layer, torch.randn(3, 5, in_features, requires_grad=True)


def gradients(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    torch.autograd.backward(y, grad)
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.fixture(params=["int8", "fp32", "onednn"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way to multiply is tested on every machine: slow routes are as exact as fast ones."""
    monkeypatch.setattr(gemm, "CPU_HAS_INT8", request.param == "int8")
    monkeypatch.setattr(gemm, "CPU_PREFERS_ONEDNN", request.param == "onednn")
    return str(request.param)


@pytest.mark.usefixtures("route")
def test_forward_and_gradients_equal_the_textbook_layer_in_float64() -> None:
    layer, x = layer_and_input()
    grad = torch.randn(3, 5, 24)

    y, x_grad = gradients(layer, x, grad)

    weight = layer.weight.detach().double().requires_grad_()
    expected_y, expected_x_grad = gradients(lambda value: textbook(value, weight), x.double(), grad.double())
    assert relative_error(y, expected_y) < 2e-7
    assert relative_error(x_grad, expected_x_grad) < 1e-6
    assert layer.weight.grad is not None
    assert weight.grad is not None
    assert relative_error(layer.weight.grad, weight.grad) < 1e-6


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def test_all_routes_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_and_input()
    results = []
    for has_int8 in (True, False):
        monkeypatch.setattr(gemm, "CPU_HAS_INT8", has_int8)
        results.append(layer(x).detach())

    assert torch.equal(*results)


def test_at_amount_zero_it_is_a_linear_layer_to_the_bit() -> None:
    layer = BitLinear(40, 24, bias=True)
    set_quant_amount(layer, 0)
    x = torch.randn(7, 40)

    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("amount", [0.25, 0.9])
@pytest.mark.parametrize("activations", [True, False])
def test_between_it_blends_as_the_paper_says(amount: float, activations: bool) -> None:
    layer, x = layer_and_input()
    set_quant_amount(layer, amount, activations=activations)
    grad = torch.randn(3, 5, 24)

    y, x_grad = gradients(layer, x, grad)

    weight = layer.weight.detach().double().requires_grad_()
    expected_y, expected_x_grad = gradients(
        lambda value: textbook(
            value, weight, amount=amount, activation_amount=amount if activations else 1.0
        ),
        x.double(),
        grad.double(),
    )
    assert weight.grad is not None
    assert layer.weight.grad is not None
    assert relative_error(y, expected_y) < 1e-6
    assert relative_error(x_grad, expected_x_grad) < 1e-6
    assert relative_error(layer.weight.grad, weight.grad) < 1e-6


def test_the_weight_gradient_is_that_of_a_linear_layer_fed_the_effective_input() -> None:
    for amount in (0.0, 0.5, 1.0):
        layer, x = layer_and_input()
        set_quant_amount(layer, amount)
        grad = torch.randn(3, 5, 24)
        gradients(layer, x, grad)

        effective = layer.effective_input(x).detach().flatten(0, 1)

        assert layer.weight.grad is not None
        torch.testing.assert_close(
            layer.weight.grad, grad.flatten(0, 1).t() @ effective, rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            layer(x).flatten(0, 1), effective @ layer.effective_weight().detach().t(), rtol=1e-5, atol=1e-5
        )


def test_without_activation_quantisation_only_the_weight_is_ternary() -> None:
    torch.manual_seed(1)
    layer = BitLinearNoActivationQuant(40, 24)
    set_quant_amount(layer, 1.0)
    x = torch.randn(6, 40)

    torch.testing.assert_close(
        layer(x), textbook(x, layer.weight, activation_amount=0.0), rtol=1e-5, atol=1e-6
    )


def test_the_effective_input_passes_norm_sparsity_and_rounding_in_this_order() -> None:
    torch.manual_seed(2)
    layer = BitLinear(12, 5, input_norm=SubLN(12))
    set_sparsity(layer, Sparsity(0.5))
    x = torch.randn(4, 12) * 3

    effective = layer.effective_input(x)

    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    kept = normed.abs() >= normed.abs().topk(6).values[:, -1:]
    absmax = normed.abs().amax(-1, keepdim=True)
    expected = torch.where(kept, (normed * 127 / absmax).round() * absmax / 127, 0)
    torch.testing.assert_close(effective, expected)


def test_subln_is_blended_in_from_the_identity() -> None:
    torch.manual_seed(3)
    layer = BitLinear(12, 5, input_norm=SubLN(12))
    plain = BitLinear.from_linear(layer)
    x = torch.randn(4, 12) * 3
    assert layer.input_norm is not None

    set_subln_amount(layer, 0.0)
    assert torch.equal(layer(x), plain(x))
    set_subln_amount(layer, 1.0)
    assert torch.equal(layer(x), plain(layer.input_norm(x)))
    set_subln_amount(layer, 0.25)
    torch.testing.assert_close(layer(x), plain(x + 0.25 * (layer.input_norm(x) - x)), rtol=1e-2, atol=1e-2)


def test_a_bias_is_added_in_full_precision() -> None:
    torch.manual_seed(4)
    layer = BitLinear(16, 6, bias=True)
    x = torch.randn(3, 16)

    torch.testing.assert_close(layer(x), textbook(x, layer.weight) + layer.bias, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("has_bf16", [True, False])
def test_under_autocast_the_result_is_one_bf16_rounding_away(
    has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "CPU_HAS_BF16", has_bf16)
    layer, x = layer_and_input()
    grad = torch.randn(3, 5, 24).bfloat16()

    with torch.autocast("cpu", torch.bfloat16):
        y, x_grad = gradients(layer, x, grad)

    weight = layer.weight.detach().double().requires_grad_()
    expected_y, expected_x_grad = gradients(lambda value: textbook(value, weight), x.double(), grad.double())
    assert y.dtype == torch.bfloat16
    assert x_grad.dtype == torch.float32
    assert layer.weight.grad is not None
    assert weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    rounding = torch.finfo(torch.bfloat16).eps
    # The result is exact and then rounded once: all but the rare tie equals the rounded float64 value.
    assert float((y == expected_y.bfloat16()).float().mean()) > 0.98
    assert relative_error(x_grad, expected_x_grad) < rounding
    assert relative_error(layer.weight.grad, weight.grad) < rounding


def test_a_bf16_model_quantises_the_stored_weight() -> None:
    torch.manual_seed(5)
    layer = BitLinear(40, 24, bias=True, dtype=torch.bfloat16)
    x = torch.randn(7, 40, dtype=torch.bfloat16)

    y = layer(x)

    expected = textbook(x.double(), layer.weight.detach().double()) + layer.bias.detach().double()
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < torch.finfo(torch.bfloat16).eps
    y.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.bfloat16


def test_a_bf16_backward_can_be_chosen_in_fp32_training() -> None:
    layer, x = layer_and_input()
    grad = torch.randn(3, 5, 24)
    _, exact = gradients(layer, x, grad)
    set_backward_dtype(layer, torch.bfloat16)

    _, rough = gradients(layer, x, grad)

    assert rough.dtype == torch.float32
    assert 1e-4 < relative_error(rough, exact) < torch.finfo(torch.bfloat16).eps


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("amount", [0.0, 0.5, 1.0])
def test_bad_numbers_reach_the_output(bad: float, amount: float) -> None:
    layer, x = layer_and_input()
    set_quant_amount(layer, amount)
    poisoned = x.detach().clone()
    poisoned[1, 2, 3] = bad

    finite = layer(poisoned).isfinite()

    assert not finite[1, 2].any()
    assert int((~finite).any(-1).sum()) == 1  # no other token
    with torch.no_grad():
        layer.weight[0, 0] = bad
    assert not layer(x).isfinite().all()


def test_it_saves_int8_activations_and_nothing_dequantised() -> None:
    layer, x = layer_and_input(in_features=64, out_features=32)
    saved: list[Tensor] = []

    def remember(value: Tensor) -> Tensor:
        saved.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda value: value):
        layer(x)

    shapes = {(tuple(value.shape), value.dtype) for value in saved}
    assert shapes == {
        ((3, 5, 64), torch.int8),
        ((3, 5, 1), torch.float32),
        ((32, 64), torch.int8),
        ((), torch.float32),
    }


def test_siblings_share_one_quantised_input() -> None:
    torch.manual_seed(6)
    gate, up = BitLinear(16, 8), BitLinear(16, 24)
    x = torch.randn(5, 16, requires_grad=True)
    kept: list[Tensor] = []

    def remember(value: Tensor) -> Tensor:
        if value.dtype == torch.int8 and value.shape == x.shape:
            kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda value: value):
        gate(x), up(x)
        with torch.no_grad():
            x.mul_(2)
        gate(x)

    assert kept[0].data_ptr() == kept[1].data_ptr()
    assert kept[2].data_ptr() != kept[0].data_ptr()  # x was changed in place


def test_amounts_outside_zero_and_one_are_refused() -> None:
    layer = BitLinear(4, 3)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(UserError, match="between 0 and 1"):
            set_quant_amount(layer, bad)
        with pytest.raises(UserError, match="between 0 and 1"):
            set_subln_amount(layer, bad)


def test_the_dials_are_not_part_of_the_state() -> None:
    layer = BitLinear(4, 3, bias=True, input_norm=SubLN(4))
    set_quant_amount(layer, 0.3)

    assert sorted(layer.state_dict()) == ["bias", "input_norm.weight", "weight"]


def test_a_layer_made_from_a_linear_shares_its_parameters() -> None:
    linear = nn.Linear(6, 4, dtype=torch.bfloat16).eval()

    layer = BitLinear.from_linear(linear)

    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training


@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 0, 40), (1, 40), (2, 3, 4, 40)])
def test_any_leading_shape_works(shape: tuple[int, ...]) -> None:
    layer, _ = layer_and_input()
    x = torch.randn(shape, requires_grad=True)

    y = layer(x)
    y.sum().backward()

    assert y.shape == (*shape[:-1], 24)
    assert x.grad is not None
    assert x.grad.shape == x.shape
