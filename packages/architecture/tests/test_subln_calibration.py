"""Calibrated gains: the formula on inputs written down here, and a model that stays near itself."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet_arch.bitlinear import set_quant_amount
from bitnet_arch.conversion_config import ConversionConfig
from bitnet_arch.convert import convert_to_bitnet
from bitnet_arch.subln_calibration import InputMagnitude, calibrate_subln, subln_gains
from bitnet_arch.testing import TINY_MODELS, tiny_bitnet, tiny_llama
from bitnet_arch.walk import walk
from durable import UserError

IDS = torch.arange(7, 47).reshape(2, 20)


def gain_of(*tokens: list[float]) -> Tensor:
    magnitude = InputMagnitude()
    for token in tokens:
        magnitude.add(torch.tensor([token]))
    return magnitude.gain()


def test_tokens_of_one_magnitude_have_it_as_their_gain() -> None:
    # rms([3, 4]) = rms([-5, 0]) = √12.5
    gain = gain_of([3.0, 4.0], [-5.0, 0.0])

    torch.testing.assert_close(gain, torch.full((2,), math.sqrt(12.5), dtype=torch.float64))


def test_a_channels_gain_is_the_geometric_mean_weighted_by_its_share_of_energy() -> None:
    # Token one is all in channel one (share 2, rms 4/√2), token two half in each (shares 1 and 1, rms 2).
    gain = gain_of([4.0, 0.0], [2.0, 2.0])

    first = math.exp((2 * math.log(4 / math.sqrt(2)) + math.log(2)) / 3)
    torch.testing.assert_close(gain, torch.tensor([first, 2.0], dtype=torch.float64))


def test_a_token_with_a_massive_activation_leaves_the_other_channels_alone() -> None:
    ordinary = [[1.0, -1.0, 1.0]] * 8

    gain = gain_of(*ordinary, [3000.0, 1.0, 1.0])

    assert gain[0] > 5
    torch.testing.assert_close(gain[1:], torch.ones(2, dtype=torch.float64), atol=1e-5, rtol=0)


def test_channels_and_tokens_that_are_always_zero_do_no_harm() -> None:
    torch.testing.assert_close(gain_of([2.0, 0.0], [0.0, 0.0]), torch.full((2,), math.sqrt(2)).double())
    assert gain_of([0.0, 0.0]).tolist() == [1.0, 1.0]


# Gemma norms again behind both projections, and BitNet has sub-norms of its own.
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("subln", ["output", "all"])
def test_a_calibrated_model_is_nearer_to_the_original_than_one_with_gains_of_one(
    family: str, subln: Any
) -> None:
    def distance(init: Any, batches: list[Tensor] | None) -> float:
        model: Any = TINY_MODELS[family]()
        with torch.no_grad():
            before = model(IDS).logits.log_softmax(-1)
            config = ConversionConfig(subln=subln, subln_init=init, calibration_batches=batches)
            convert_to_bitnet(model, config)
            set_quant_amount(model, 0.0)
            after = model(IDS).logits.log_softmax(-1)
        return float((before.exp() * (before - after)).sum(-1).mean())

    other_ids = [torch.randint(512, (64, 32), generator=torch.Generator().manual_seed(1))]

    assert distance("calibrated", other_ids) < 0.7 * distance("ones", None)


def test_calibrating_later_gives_the_gains_of_a_calibrated_conversion() -> None:
    at_once, later = tiny_llama(), tiny_llama()
    config = ConversionConfig(subln="output", subln_init="calibrated", calibration_batches=[IDS, IDS + 9])
    convert_to_bitnet(at_once, config)

    convert_to_bitnet(later, ConversionConfig(subln="output", subln_amount=0.5))
    calibrate_subln(later, iter([IDS, IDS + 9]))

    for name, tensor in at_once.state_dict().items():
        assert torch.equal(tensor, later.state_dict()[name]), name
    down: Any = later.model.layers[0].mlp.down_proj
    assert (down.quant_amount, down.activation_amount, down.subln_amount) == (1.0, 1.0, 0.5)


def test_calibration_sees_the_activation_that_conversion_puts_in() -> None:
    model: Any = tiny_llama()
    path = "model.layers.1.mlp.down_proj"
    reference: Any = tiny_llama(hidden_act="relu2")
    expected = subln_gains(reference, [path], [IDS])[path]

    config = ConversionConfig(
        subln="output", subln_init="calibrated", calibration_batches=[IDS], hidden_act="relu2"
    )
    convert_to_bitnet(model, config)

    torch.testing.assert_close(
        model.get_submodule(path).input_norm.weight.double(), expected, rtol=1e-6, atol=0
    )


def test_padding_has_no_say() -> None:
    model = tiny_llama()
    path = "model.layers.1.self_attn.o_proj"
    padded = torch.cat([IDS, torch.zeros(2, 9, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros(2, 9, dtype=torch.long)], dim=1)

    gain = subln_gains(model, [path], [{"input_ids": padded, "attention_mask": mask}])[path]

    torch.testing.assert_close(gain, subln_gains(model, [path], [IDS])[path], rtol=1e-5, atol=0)


def test_a_single_sequence_is_a_batch_of_one() -> None:
    model = tiny_llama()
    path = "model.layers.0.mlp.down_proj"

    assert torch.equal(
        subln_gains(model, [path], [IDS[0]])[path], subln_gains(model, [path], [IDS[:1]])[path]
    )


def test_the_training_mode_of_every_module_comes_back() -> None:
    model: Any = tiny_llama()
    model.train()
    model.model.layers[0].eval()

    subln_gains(model, ["model.layers.0.mlp.down_proj"], [IDS])

    assert model.training
    assert not model.model.layers[0].mlp.training
    assert model.model.layers[1].mlp.training


@pytest.mark.parametrize(
    ("batches", "fragment"),
    [
        ([], "without tokens"),
        ([{"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}], "padding only"),
        ([torch.rand(2, 4)], "not a tensor of token ids"),
        ([{"ids": IDS}], "not a tensor of token ids"),
        (["hello"], "not a tensor of token ids"),
        ([torch.tensor([[5, 512]])], "below 512"),
    ],
)
def test_unusable_batches_are_one_line_and_leave_the_model_as_it_was(batches: Any, fragment: str) -> None:
    model = tiny_llama()
    before = dict(model.named_modules())
    config = ConversionConfig(
        subln="output", subln_init="calibrated", calibration_batches=batches, hidden_act="relu2"
    )

    with pytest.raises(UserError, match=fragment) as caught:
        convert_to_bitnet(model, config)

    assert caught.value.exit_code == 2
    assert dict(model.named_modules()) == before
    assert walk(model).activation == "silu"


def test_an_input_that_overflows_is_named() -> None:
    model: Any = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(3e38)

    with pytest.raises(UserError, match=r"layers\.0\.mlp\.down_proj.*not finite") as caught:
        subln_gains(model, ["model.layers.0.mlp.down_proj"], [IDS])

    assert caught.value.exit_code == 4


@pytest.mark.parametrize("build", [tiny_llama, tiny_bitnet])
def test_a_model_without_inserted_subln_cannot_be_calibrated(build: Any) -> None:
    model = build()
    convert_to_bitnet(model)

    with pytest.raises(UserError, match="no SubLN to calibrate"):
        calibrate_subln(model, [IDS])
