"""The tiny models that other tests stand on."""

import math

import pytest
import torch

from bitnet_arch.testing import TINY_MODELS, assert_same_distribution, tiny_llama


@pytest.mark.parametrize("family", TINY_MODELS)
def test_the_same_seed_builds_the_same_bits_and_leaves_the_random_state_alone(family: str) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)

    first, second, other = (TINY_MODELS[family](seed=seed) for seed in (1, 1, 2))

    assert torch.equal(torch.rand(4), expected)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
        assert not torch.equal(tensor, other.state_dict()[name])


@pytest.mark.parametrize("family", TINY_MODELS)
def test_vocabulary_and_configuration_can_be_chosen(family: str) -> None:
    model = TINY_MODELS[family](vocab_size=96, max_position_embeddings=64)

    assert model(torch.tensor([[5, 95]])).logits.shape == (1, 2, 96)
    assert model.config.max_position_embeddings == 64


def test_gains_and_biases_are_not_the_values_that_hide_faults() -> None:
    for build in TINY_MODELS.values():
        for name, parameter in build().named_parameters():
            if parameter.ndim == 1:
                assert parameter.std() > 0.05, name


def test_models_build_in_a_moment() -> None:
    assert sum(p.numel() for p in tiny_llama().parameters()) < 200_000


def test_kl_is_measured_in_nats_per_position() -> None:
    even, odd = torch.zeros(1, 2), torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)
    # KL(1/2, 1/2 ‖ 1/4, 3/4) = ½·ln 2 + ½·ln ⅔
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)

    assert_same_distribution(even, odd, kl=expected + 1e-9)
    with pytest.raises(AssertionError, match=r"KL is 0\.144"):
        assert_same_distribution(even, odd, kl=expected - 1e-6)


def test_logits_that_are_not_numbers_are_never_the_same() -> None:
    broken = torch.full((1, 4), float("nan"))

    with pytest.raises(AssertionError, match="not finite"):
        assert_same_distribution(broken, broken)
