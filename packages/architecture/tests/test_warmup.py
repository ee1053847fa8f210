"""λ warmup: values, ends, state, and that it acts on one model only."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from bitnet_arch.bitlinear import BitLinear, BitLinearNoActivationQuant
from bitnet_arch.quant import dequantize_activations, quantize_activations, ternary
from bitnet_arch.warmup import BitLinearWithWarmup, LambdaWarmup
from durable import UserError


def layers() -> nn.Sequential:
    return nn.Sequential(BitLinear(6, 5), nn.ReLU(), BitLinear(5, 3))


def amounts(model: nn.Module) -> list[tuple[float, float]]:
    return [(m.quant_amount, m.activation_amount) for m in model.modules() if isinstance(m, BitLinear)]


def steps(warmup: LambdaWarmup, count: int) -> list[float]:
    return [warmup.step() for _ in range(count)]


def test_linear_is_half_way_after_half_of_the_steps_and_every_layer_has_it() -> None:
    model = layers()
    warmup = LambdaWarmup(model, warmup_steps=100)

    assert steps(warmup, 50)[-1] == 0.5
    assert warmup.lambda_val == 0.5
    assert amounts(model) == [(0.5, 0.5), (0.5, 0.5)]


def test_cosine_starts_slowly_and_meets_linear_in_the_middle() -> None:
    values = steps(LambdaWarmup(layers(), warmup_steps=4, schedule="cosine"), 5)

    root = math.sqrt(0.5)
    assert values == pytest.approx([(1 - root) / 2, 0.5, (1 + root) / 2, 1.0, 1.0])


def test_it_ends_at_the_last_value_exactly_and_stays() -> None:
    warmup = LambdaWarmup(layers(), warmup_steps=10)

    assert steps(warmup, 9)[-1] == pytest.approx(0.9)
    assert not warmup.is_warmup_complete()
    assert steps(warmup, 91)[-1] == 1.0
    assert warmup.is_warmup_complete()
    assert warmup.current_step == 100


def test_the_ends_are_the_given_ones() -> None:
    warmup = LambdaWarmup(layers(), warmup_steps=7, min_lambda=0.5, max_lambda=0.9)

    assert warmup.lambda_val == 0.5
    assert steps(warmup, 7)[-1] == 0.9


def test_the_first_value_is_on_the_model_before_the_first_step() -> None:
    model = layers()

    LambdaWarmup(model, warmup_steps=10)

    assert amounts(model) == [(0, 0), (0, 0)]


def test_no_warmup_steps_means_fully_ternary_at_once() -> None:
    model = layers()

    warmup = LambdaWarmup(model, warmup_steps=0, min_lambda=0.2)

    assert warmup.lambda_val == 1.0
    assert warmup.is_warmup_complete()
    assert amounts(model) == [(1, 1), (1, 1)]


def test_activations_can_stay_quantised_throughout() -> None:
    model = layers()

    LambdaWarmup(model, warmup_steps=10, activations=False).step()

    assert amounts(model) == [(0.1, 1), (0.1, 1)]


def test_a_layer_without_activation_quantisation_never_gets_any() -> None:
    model = nn.Sequential(BitLinearNoActivationQuant(4, 3))

    LambdaWarmup(model, warmup_steps=0)
    LambdaWarmup(model, warmup_steps=0, activations=False)

    assert amounts(model) == [(1, 0)]


def test_two_models_do_not_share_a_warmup() -> None:
    student, teacher = layers(), layers()

    LambdaWarmup(student, warmup_steps=10).step()

    assert amounts(teacher) == [(1, 1), (1, 1)]
    assert amounts(student) == [(0.1, 0.1), (0.1, 0.1)]


def test_a_misspelt_schedule_is_refused_at_once_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        LambdaWarmup(layers(), schedule="cosin")


@pytest.mark.parametrize("ends", [(0.6, 0.4), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_ends_outside_of_zero_and_one_or_in_the_wrong_order_are_refused(ends: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="0 <= min_lambda <= max_lambda <= 1"):
        LambdaWarmup(layers(), min_lambda=ends[0], max_lambda=ends[1])


def test_negative_steps_are_refused() -> None:
    with pytest.raises(UserError, match="warmup_steps"):
        LambdaWarmup(layers(), warmup_steps=-1)
    with pytest.raises(UserError, match="warmup_steps"):
        BitLinearWithWarmup(4, 3, warmup_steps=-1)


def test_a_resumed_warmup_goes_on_as_if_never_stopped_whatever_it_was_built_with() -> None:
    original = LambdaWarmup(
        layers(), warmup_steps=8, schedule="cosine", min_lambda=0.1, max_lambda=0.7, activations=False
    )
    steps(original, 3)
    model = layers()
    resumed = LambdaWarmup(model, warmup_steps=500)

    resumed.load_state_dict(original.state_dict())

    assert amounts(model) == amounts(original.model), "the model has it before the next step"
    assert resumed.state_dict() == original.state_dict()
    assert steps(resumed, 6) == steps(original, 6)


def test_the_state_is_json_and_names_its_parts() -> None:
    import json

    warmup = LambdaWarmup(layers(), warmup_steps=8)

    assert json.loads(json.dumps(warmup.state_dict())) == warmup.state_dict()
    assert warmup.state_dict().keys() >= {
        *("current_step", "lambda", "warmup_steps", "schedule", "min_lambda", "max_lambda")
    }


def test_an_incomplete_state_is_refused_by_the_missing_names() -> None:
    with pytest.raises(UserError, match="max_lambda") as caught:
        LambdaWarmup(layers()).load_state_dict({"current_step": 3})

    assert caught.value.exit_code == 4


def test_lambda_is_no_part_of_the_models_state_dict() -> None:
    model = layers()
    before = model.state_dict().keys()

    LambdaWarmup(model, warmup_steps=10).step()

    assert model.state_dict().keys() == before == {"0.weight", "2.weight"}


def test_the_layer_with_its_own_warmup_mixes_weights_and_always_quantises_activations() -> None:
    torch.manual_seed(3)
    layer = BitLinearWithWarmup(6, 5, bias=True, warmup_steps=4)
    x = torch.randn(2, 3, 6)
    quantised_x = dequantize_activations(*quantize_activations(x))

    for expected in (0.0, 0.25, 0.5, 0.75, 1.0, 1.0):
        mixed = (1 - expected) * layer.weight + expected * ternary(layer.weight)
        torch.testing.assert_close(layer(x), linear(quantised_x, mixed, layer.bias))
        assert layer.quant_amount == expected
        layer.step()


def test_the_layer_with_its_own_warmup_can_be_continued() -> None:
    layer = BitLinearWithWarmup(6, 5, warmup_steps=4)

    layer.current_step = 3

    assert layer.quant_amount == 0.75
    assert layer.step() == 1.0
    assert BitLinearWithWarmup(6, 5, warmup_steps=0).quant_amount == 1.0
    assert layer.state_dict().keys() == {"weight"}
