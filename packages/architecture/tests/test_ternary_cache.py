"""Quantised weights are refreshed once per optimizer step and never stale."""

import copy
from collections.abc import Callable, Iterable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from bitnet_arch import ternary_cache
from bitnet_arch.bitlinear import BitLinear, forget_quantized_weights
from bitnet_arch.quant import quantize_weight


def fresh_output(layer: BitLinear, x: Tensor) -> Tensor:
    """What a layer that has never seen another weight says."""
    newborn = BitLinear(layer.in_features, layer.out_features, dtype=layer.weight.dtype)
    newborn.load_state_dict(layer.state_dict())
    y: Tensor = newborn(x)
    return y


def is_fresh(layer: BitLinear, x: Tensor) -> bool:
    return torch.equal(layer(x), fresh_output(layer, x))


@pytest.fixture
def layer() -> BitLinear:
    torch.manual_seed(0)
    return BitLinear(24, 16)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 24, generator=torch.Generator().manual_seed(1))


def count_quantisations(action: Callable[[], Any]) -> int:
    with patch.object(ternary_cache, "quantize_weight", side_effect=quantize_weight) as spy:
        action()
    return spy.call_count


def test_it_is_quantised_once_for_all_uses_between_two_steps(layer: BitLinear, x: Tensor) -> None:
    def one_optimizer_step() -> None:
        for _ in range(3):
            layer(x).sum().backward()
        torch.utils.checkpoint.checkpoint(layer, x.requires_grad_(), use_reentrant=False).sum().backward()
        with torch.no_grad():
            layer.eval()(x)

    assert count_quantisations(one_optimizer_step) == 1


OPTIMIZERS: list[Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = [
    lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=False),
    lambda parameters: torch.optim.Muon(parameters, lr=0.1),
    lambda parameters: torch.optim.SGD(parameters, lr=10.0),
]


@pytest.mark.parametrize("make", OPTIMIZERS, ids=["fused", "foreach", "for-loop", "muon", "sgd"])
def test_no_optimizer_leaves_it_stale(
    make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer], layer: BitLinear, x: Tensor
) -> None:
    optimizer = make(layer.parameters())
    for _ in range(3):
        before = layer(x)
        before.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

        assert is_fresh(layer, x)
        assert not torch.equal(layer(x), before)


def test_an_edit_in_place_is_seen(layer: BitLinear, x: Tensor) -> None:
    layer(x)
    with torch.no_grad():
        layer.weight.mul_(-2)
    assert is_fresh(layer, x)


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_is_seen(layer: BitLinear, x: Tensor, assign: bool) -> None:
    layer(x)
    layer.load_state_dict({"weight": torch.randn(16, 24)}, assign=assign)
    assert is_fresh(layer, x)


def test_a_round_trip_through_bf16_is_seen(layer: BitLinear, x: Tensor) -> None:
    layer(x)
    layer.to(torch.bfloat16).to(torch.float32)
    assert is_fresh(layer, x)


def test_an_assigned_parameter_is_seen(layer: BitLinear, x: Tensor) -> None:
    layer(x)
    layer.weight = nn.Parameter(torch.randn(16, 24))
    assert is_fresh(layer, x)


def test_a_copy_lives_its_own_life(layer: BitLinear, x: Tensor) -> None:
    original = layer(x)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.neg_()

    assert is_fresh(twin, x)
    assert torch.equal(layer(x), original)


def test_tied_layers_follow_the_one_weight(layer: BitLinear, x: Tensor) -> None:
    tied = BitLinear.from_linear(layer)
    tied(x), layer(x)
    optimizer = torch.optim.AdamW([layer.weight], lr=0.1, fused=True)
    layer(x).square().sum().backward()
    optimizer.step()

    assert is_fresh(tied, x)
    assert is_fresh(layer, x)


def test_a_functional_call_uses_the_weight_it_is_given(layer: BitLinear, x: Tensor) -> None:
    own = layer(x)
    other = torch.randn(16, 24)

    substituted = torch.func.functional_call(layer, {"weight": other}, (x,))
    expected = BitLinear(24, 16)
    expected.load_state_dict({"weight": other})

    assert torch.equal(substituted, expected(x))
    assert torch.equal(layer(x), own)


def test_parameters_made_under_inference_mode_work(x: Tensor) -> None:
    with torch.inference_mode():
        layer = BitLinear(24, 16)
        first = layer(x)
        layer.weight.neg_()
        assert torch.equal(layer(x), -first)


def test_writing_through_data_needs_a_word(layer: BitLinear, x: Tensor) -> None:
    layer(x)
    layer.weight.data.mul_(-3)
    forget_quantized_weights(layer)
    assert is_fresh(layer, x)
