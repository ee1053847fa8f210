"""Conversion: what changes, what stays the very same object, and what is refused before anything changes."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.bitnet import AutoBitLinear

from bitnet_arch.bitlinear import BitLinear, set_quant_amount, set_subln_amount
from bitnet_arch.conversion_config import ConversionConfig
from bitnet_arch.convert import convert_to_bitnet
from bitnet_arch.testing import (
    TINY_MODELS,
    assert_same_distribution,
    tiny_bitnet,
    tiny_gemma3,
    tiny_llama,
    tiny_qwen2,
)
from bitnet_arch.walk import PROJECTIONS, walk
from durable import UserError

Placement = Literal["none", "output", "all"]
families = pytest.mark.parametrize("family", TINY_MODELS)
IDS = torch.arange(3, 45).reshape(2, 21)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def textbook_logits(model: Any, projections: Iterable[str]) -> Tensor:
    """The dense model with every projection replaced by the paper's formulas in a hook."""

    def quantised(module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
        x, weight = args[0], module.weight
        absmax = x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        scale = weight.abs().double().mean().float()
        x_q = (x * (127 / absmax)).round() * absmax / 127
        return nn.functional.linear(x_q, (weight / scale).round().clamp(-1, 1) * scale, module.bias)

    handles = [model.get_submodule(path).register_forward_hook(quantised) for path in projections]
    result = logits(model)
    for handle in handles:
        handle.remove()
    return result


@families
def test_all_seven_projections_of_every_layer_become_ternary_and_nothing_else(family: str) -> None:
    model: Any = TINY_MODELS[family]()
    num_layers = model.config.num_hidden_layers

    report = convert_to_bitnet(model)

    ternary = {name for name, module in model.named_modules() if isinstance(module, BitLinear)}
    assert set(report.converted) == ternary
    assert sorted(name.rpartition(".")[2] for name in ternary) == sorted(PROJECTIONS * num_layers)
    assert type(model.lm_head) is nn.Linear


@families
def test_a_converted_model_computes_the_papers_formulas(family: str) -> None:
    model: Any = TINY_MODELS[family]()
    expected = textbook_logits(model, walk(model).projections)

    convert_to_bitnet(model)

    # The last bit of a sum may flip one rounding to int8; the dense model is away by 0.1 and more.
    assert_same_distribution(expected, logits(model), kl=1e-5)


@families
@pytest.mark.parametrize("subln", ["none", "output", "all"])
def test_at_zero_lambda_and_mu_the_model_is_the_original_to_the_bit(family: str, subln: Placement) -> None:
    model: Any = TINY_MODELS[family]()
    expected = logits(model)

    convert_to_bitnet(model, ConversionConfig(subln=subln))
    set_quant_amount(model, 0.0)
    set_subln_amount(model, 0.0)

    assert torch.equal(logits(model), expected)


@families
def test_parameters_stay_the_same_objects(family: str) -> None:
    model: Any = TINY_MODELS[family]()
    before = dict(model.named_parameters(remove_duplicate=False))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()

    report = convert_to_bitnet(model)

    after = dict(model.named_parameters(remove_duplicate=False))
    moved = {f"{norm}.weight": f"{path}.input_norm.weight" for path, norm in report.subln_adopted.items()}
    assert {moved.get(name, name) for name in before} == set(after)
    assert all(after[moved.get(name, name)] is parameter for name, parameter in before.items())
    assert model.get_input_embeddings() is embedding
    assert model.get_output_embeddings() is head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_stays_also_that_of_biases_and_of_new_norms(dtype: torch.dtype) -> None:
    model: Any = tiny_qwen2()
    model.to(dtype)

    convert_to_bitnet(model, ConversionConfig(subln="all"))

    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    assert logits(model).dtype == dtype


def test_training_mode_stays() -> None:
    model: Any = tiny_llama().train()

    convert_to_bitnet(model, ConversionConfig(subln="output"))

    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(("subln", "expected"), [("none", 0), ("output", 4), ("all", 14)])
def test_subln_goes_where_the_placement_says(subln: Placement, expected: int) -> None:
    model: Any = tiny_llama()

    report = convert_to_bitnet(model, ConversionConfig(subln=subln))

    modules = dict(model.named_modules())
    normed = {path for path in walk(model).projections if modules[path].input_norm is not None}
    assert set(report.subln_inserted) == normed
    assert len(normed) == expected
    if subln == "output":
        assert {name.rpartition(".")[2] for name in normed} == {"o_proj", "down_proj"}


def test_subln_has_the_models_eps_and_normalises_its_own_input() -> None:
    model: Any = tiny_qwen2(rms_norm_eps=3e-4)

    convert_to_bitnet(model, ConversionConfig(subln="all"))

    for path in walk(model).projections:
        layer = model.get_submodule(path)
        assert layer.input_norm.eps == 3e-4
        assert torch.equal(layer.input_norm.weight, torch.ones(layer.in_features))


def test_mu_starts_where_the_configuration_says_and_lambda_at_one() -> None:
    model: Any = tiny_llama()

    convert_to_bitnet(model, ConversionConfig(subln="output", subln_amount=0.25))

    down = model.model.layers[1].mlp.down_proj
    assert (down.subln_amount, down.quant_amount, down.activation_amount) == (0.25, 1.0, 1.0)


@pytest.mark.parametrize("subln", ["none", "output", "all"])
def test_bitnets_own_sub_norms_are_adopted_and_never_doubled(subln: Placement) -> None:
    model: Any = tiny_bitnet()
    own = {
        f"model.layers.{layer}.{name}": model.get_parameter(f"model.layers.{layer}.{name}.weight")
        for layer in (0, 1)
        for name in ("self_attn.attn_sub_norm", "mlp.ffn_sub_norm")
    }
    expected = textbook_logits(model, walk(model).projections)

    report = convert_to_bitnet(model, ConversionConfig(subln=subln))

    assert set(report.subln_adopted.values()) == set(own)
    for path, norm in report.subln_adopted.items():
        assert type(model.get_submodule(norm)) is nn.Identity
        assert model.get_submodule(path).input_norm.weight is own[norm]
        assert path not in report.subln_inserted
    if subln != "all":
        assert_same_distribution(expected, logits(model), kl=1e-5)


def test_an_excluded_projection_of_bitnet_keeps_its_norm_in_place() -> None:
    model: Any = tiny_bitnet()
    norm = model.model.layers[0].mlp.ffn_sub_norm

    convert_to_bitnet(model, ConversionConfig(exclude=("layers.0.mlp.down_proj",)))

    assert model.model.layers[0].mlp.ffn_sub_norm is norm
    assert type(model.model.layers[1].mlp.ffn_sub_norm) is nn.Identity


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("q_proj", 2),
        ("model.layers.1.mlp.up_proj", 1),
        ("layers.0", 7),
        ("mlp", 6),
        ("layers.*.self_attn.[qk]_proj", 4),
        ("*_proj", 14),
        ("lm_head", 0),
        ("embed_tokens", 0),
    ],
)
def test_exclude_covers_names_paths_ends_of_paths_and_globs(pattern: str, expected: int) -> None:
    model: Any = tiny_llama()
    config = ConversionConfig(exclude=(pattern,))

    if expected == 14:
        with pytest.raises(UserError, match="nothing is left to convert"):
            convert_to_bitnet(model, config)
        return
    report = convert_to_bitnet(model, config)

    assert len(report.skipped) == expected
    assert all(type(model.get_submodule(path)) is nn.Linear for path in report.skipped)
    assert len(report.converted) == 14 - expected


@pytest.mark.parametrize("pattern", ["q_prj", "layers.7.mlp", "proj", "layers.1.mlp.gate_projj"])
def test_a_pattern_that_matches_nothing_is_an_error_with_a_suggestion(pattern: str) -> None:
    model: Any = tiny_llama()

    with pytest.raises(UserError, match="matches no module") as caught:
        convert_to_bitnet(model, ConversionConfig(exclude=(pattern,)))

    assert pattern in str(caught.value)
    assert caught.value.exit_code == 2
    if pattern == "q_prj":
        assert "did you mean 'q_proj'" in str(caught.value)
    assert not any(isinstance(module, BitLinear) for module in model.modules())


def test_a_single_string_is_one_pattern() -> None:
    assert len(convert_to_bitnet(tiny_llama(), ConversionConfig(exclude="q_proj")).skipped) == 2  # type: ignore[arg-type]


@families
def test_relu2_replaces_the_activation_and_stands_in_the_configuration(family: str) -> None:
    model: Any = TINY_MODELS[family]()
    x = torch.tensor([-2.0, 0.0, 3.0])

    report = convert_to_bitnet(model, ConversionConfig(hidden_act="relu2"))

    assert report.hidden_act == walk(model).activation == "relu2"
    for layer in walk(model).layers:
        assert torch.equal(model.get_submodule(f"{layer.mlp}.act_fn")(x), torch.tensor([0.0, 0.0, 9.0]))


def test_the_report_counts_parameters_and_bytes() -> None:
    # Per layer: q and o 56², k and v 8·56, gate, up and down 56·144; biases 56 + 2·8; two norms of 56.
    projections = 2 * (2 * 56 * 56 + 2 * 8 * 56 + 3 * 56 * 144)
    others = 2 * 512 * 56 + 2 * (56 + 16 + 2 * 56) + 56

    report = convert_to_bitnet(tiny_qwen2().bfloat16())

    assert (report.ternary_parameters, report.parameters) == (projections, projections + others)
    assert report.dense_bytes == 2 * (projections + others)
    assert report.packed_bytes == projections // 4 + 14 * 4 + 2 * others


def test_the_report_names_what_was_kept() -> None:
    report = convert_to_bitnet(tiny_gemma3(), ConversionConfig(exclude=("v_proj",)))

    expected = {"model.embed_tokens", "lm_head", "model.norm", "model.layers.0.self_attn.q_norm"}
    assert expected <= set(report.kept)
    assert report.skipped["model.layers.1.self_attn.v_proj"] == "excluded by v_proj"
    assert "12 projections" in str(report)


def test_an_already_converted_model_is_refused() -> None:
    model: Any = tiny_llama()
    convert_to_bitnet(model, ConversionConfig(exclude=("q_proj",)))

    with pytest.raises(UserError, match=r"already converted.*12 of 14") as caught:
        convert_to_bitnet(model)

    assert caught.value.exit_code == 2


def test_a_model_with_transformers_ternary_layers_is_refused_too() -> None:
    model: Any = tiny_llama()
    model.model.layers[0].mlp.up_proj = AutoBitLinear(64, 176, bias=False, online_quant=True)

    with pytest.raises(UserError, match=r"already converted.*AutoBitLinear"):
        convert_to_bitnet(model)


def test_a_subclass_of_linear_is_named_not_converted() -> None:
    class LoraLinear(nn.Linear):
        pass

    model: Any = tiny_llama()
    model.model.layers[0].mlp.up_proj = LoraLinear(64, 176, bias=False)

    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj.*LoraLinear"):
        convert_to_bitnet(model)


def poison_weight(model: nn.Module) -> str:
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 5] = float("nan")
    return "model.layers.1.mlp.up_proj.weight"


def poison_embedding(model: nn.Module) -> str:
    model.get_parameter("model.embed_tokens.weight").data[7, 0] = float("-inf")
    return "model.embed_tokens.weight"


def empty_weight(model: nn.Module) -> str:
    model.get_submodule("model.layers.0.self_attn.k_proj").to("meta")
    return "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize("harm", [poison_weight, poison_embedding, empty_weight])
def test_a_tensor_that_holds_no_numbers_is_refused_by_name(harm: Callable[[nn.Module], str]) -> None:
    model: Any = tiny_llama()
    name = harm(model)

    with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
        convert_to_bitnet(model)

    assert caught.value.exit_code == 4
    assert not any(isinstance(module, BitLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("setting", "fragment"),
    [
        ({"subln": "outptu"}, "did you mean 'output'"),
        ({"hidden_act": "gelu"}, "keep, relu2"),
        ({"subln_init": "zeros"}, "subln_init"),
        ({"subln_amount": 1.5}, "between 0 and 1"),
        ({"subln": "all", "subln_init": "calibrated"}, "calibration_batches"),
    ],
)
def test_a_wrong_setting_is_one_line_with_the_right_ones(setting: dict[str, object], fragment: str) -> None:
    with pytest.raises(UserError) as caught:
        ConversionConfig(**setting)  # type: ignore[arg-type]

    assert fragment in str(caught.value).replace("relu2, keep", "keep, relu2")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
