"""Giving a whole model corrections: which layers, from what start, and what the calibrated one sees."""

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitnet_arch.bitlinear import BitLinear, BitLinearNoActivationQuant, set_quant_amount, set_sparsity
from bitnet_arch.conversion_config import ConversionConfig
from bitnet_arch.convert import convert_to_bitnet
from bitnet_arch.lrc import BitLinearLRC, freeze_model_except_lrc, get_lrc_stats, lrc_layers
from bitnet_arch.lrc_convert import convert_bitlinear_to_lrc
from bitnet_arch.lrc_solve import InputStatistics, solve
from bitnet_arch.quant import ternary
from bitnet_arch.sparsity import Sparsity
from bitnet_arch.testing import tiny_llama, tiny_qwen2
from durable import UserError


def ternary_llama(**config: Any) -> Any:
    model: Any = tiny_llama()
    convert_to_bitnet(model, ConversionConfig(**config))
    return model.eval()


def dense_llama() -> Any:
    model: Any = tiny_llama()
    return model.eval()


def token_ids(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, 512, (2, 24), generator=generator) for _ in range(count)]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(token_ids(1)[0]).logits
    return result


def test_every_ternary_layer_is_replaced_over_the_same_weight() -> None:
    model = ternary_llama()
    weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, BitLinear)}

    assert convert_bitlinear_to_lrc(model) is model

    corrected = {n: m.weight for n, m in model.named_modules() if isinstance(m, BitLinearLRC)}
    assert {name: id(weight) for name, weight in corrected.items()} == {
        name: id(weight) for name, weight in weights.items()
    }
    assert len(corrected) == 14


def test_layers_inside_a_sequential_and_a_bare_layer_are_replaced() -> None:
    stack = nn.Sequential(nn.ReLU(), nn.Sequential(BitLinear(6, 5)))

    convert_bitlinear_to_lrc(stack)
    bare = convert_bitlinear_to_lrc(BitLinear(6, 5))

    assert isinstance(stack[1], nn.Sequential)
    assert isinstance(stack[1][0], BitLinearLRC)
    assert isinstance(bare, BitLinearLRC)


def test_a_layer_that_is_used_twice_stays_one_layer() -> None:
    shared = BitLinear(6, 6)
    stack = nn.Sequential(shared, nn.ReLU(), shared)

    convert_bitlinear_to_lrc(stack)

    assert stack[0] is stack[2]


def test_excluded_names_keep_all_that_they_hold() -> None:
    model = ternary_llama()

    convert_bitlinear_to_lrc(model, exclude_names=["down_proj", "self_attn"])

    corrected = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, BitLinearLRC)}
    assert corrected == {"gate_proj", "up_proj"}


def test_full_rank_and_exact_activations_bring_the_dense_model_back() -> None:
    Exact = BitLinearNoActivationQuant
    model: Any = nn.Sequential(Exact(9, 7, bias=True), nn.ReLU(), Exact(7, 4))
    x = torch.randn(5, 9)
    dense = model[2].weight @ torch.relu(x @ model[0].weight.T + model[0].bias).T

    convert_bitlinear_to_lrc(model, rank_percentage=1.0)

    torch.testing.assert_close(model(x), dense.T)


def test_the_rank_is_the_given_one_or_the_full_one_of_a_smaller_layer() -> None:
    model = convert_bitlinear_to_lrc(ternary_llama(), rank=48)

    ranks = {layer.rank for layer in lrc_layers(model)}

    assert ranks == {48, 32}, "k_proj and v_proj of the tiny model have 32 outputs"


def test_a_share_of_bytes_is_kept_to_in_the_dtype_that_is_stored() -> None:
    for dtype in (torch.float32, torch.float16):
        stats = get_lrc_stats(convert_bitlinear_to_lrc(ternary_llama(), bytes_share=0.8, lrc_dtype=dtype))

        assert stats["lrc_bytes"] <= 0.8 * stats["ternary_bytes"]
        assert stats["lrc_bytes"] > 0.4 * stats["ternary_bytes"]


def test_dtype_and_training_mode_stay_and_the_dials_too() -> None:
    model = ternary_llama().bfloat16()
    set_quant_amount(model, 0.5, activations=False)
    set_sparsity(model, Sparsity(0.25))

    convert_bitlinear_to_lrc(model)

    for layer in lrc_layers(model):
        assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
        assert (layer.quant_amount, layer.activation_amount, layer.sparsity) == (0.5, 1.0, Sparsity(0.25))
        assert not layer.training


def test_the_kaiming_start_leaves_the_model_as_it_was() -> None:
    model = ternary_llama()
    before = logits(model)

    convert_bitlinear_to_lrc(model, init_method="kaiming")

    torch.testing.assert_close(logits(model), before)


def test_the_seeds_name_of_the_svd_start_is_understood() -> None:
    by_seed, by_us = (
        convert_bitlinear_to_lrc(ternary_llama(), init_method=n) for n in ("svd_residual", "svd")
    )

    assert all(
        torch.equal(a.lrc_U, b.lrc_U) for a, b in zip(lrc_layers(by_seed), lrc_layers(by_us), strict=True)
    )


def test_corrections_bring_the_model_closer_to_the_dense_one_and_calibrated_ones_more_so() -> None:
    dense = logits(dense_llama())
    error = {"none": (logits(ternary_llama()) - dense).square().mean()}
    for init in ("svd", "calibrated"):
        model = ternary_llama()
        convert_bitlinear_to_lrc(
            model,
            rank_percentage=0.3,
            init_method=init,
            batches=token_ids() if init == "calibrated" else None,
        )
        error[init] = (logits(model) - dense).square().mean()

    assert error["svd"] < error["none"]
    assert error["calibrated"] < error["svd"]


def test_rounds_write_better_codes_and_keep_the_weight_parameter() -> None:
    dense = logits(dense_llama())
    errors, models = [], []
    for rounds in (0, 1):
        model = ternary_llama()
        weights = [id(m.weight) for m in model.modules() if isinstance(m, BitLinear)]
        convert_bitlinear_to_lrc(
            model, rank_percentage=0.1, init_method="calibrated", batches=token_ids(), rounds=rounds
        )
        assert [id(layer.weight) for layer in lrc_layers(model)] == weights
        errors.append(float((logits(model) - dense).square().mean()))
        models.append(model)

    assert errors[1] < errors[0]
    kept, rewritten = (next(lrc_layers(model)).weight for model in models)
    assert torch.equal(kept, next(m.weight for m in ternary_llama().modules() if isinstance(m, BitLinear)))
    assert not torch.equal(ternary(kept), ternary(rewritten))


def test_each_decoder_layer_is_calibrated_on_what_the_corrected_ones_below_feed_it() -> None:
    model, batches = ternary_llama(subln="output"), token_ids()
    convert_bitlinear_to_lrc(model, rank=4, init_method="calibrated", batches=batches)
    layer = model.model.layers[1].self_attn.q_proj
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))

    with torch.no_grad():
        for batch in batches:
            model(batch)

    x = torch.cat(seen)
    absmax = x.abs().amax(-1, keepdim=True)
    statistics = InputStatistics.empty(64)
    statistics.add(x, (x * (127 / absmax)).round() * (absmax / 127))
    fit = solve(layer.weight, statistics.damped(), 4)
    torch.testing.assert_close(layer.lrc_U @ layer.lrc_V.T, (fit.U @ fit.V.T).float(), rtol=1e-4, atol=1e-5)


def test_what_is_corrected_is_the_input_after_subln() -> None:
    model = ternary_llama(subln="output")
    layer = model.model.layers[0].self_attn.o_proj
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))

    convert_bitlinear_to_lrc(model, rank=4, init_method="calibrated", batches=token_ids(1))

    x = layer.input_norm(seen[0])
    absmax = x.abs().amax(-1, keepdim=True)
    statistics = InputStatistics.empty(64)
    statistics.add(x.detach(), ((x * (127 / absmax)).round() * (absmax / 127)).detach())
    fit = solve(layer.weight, statistics.damped(), 4)
    made = model.model.layers[0].self_attn.o_proj
    torch.testing.assert_close(made.lrc_U @ made.lrc_V.T, (fit.U @ fit.V.T).float(), rtol=1e-4, atol=1e-5)


def test_the_first_layer_sees_exactly_its_inputs_with_padding_left_out() -> None:
    ids, mask = token_ids(1)[0], torch.ones(2, 24, dtype=torch.int64)
    mask[1, 10:] = 0
    garbage = ids.clone()
    garbage[1, 10:] = 7
    made = []
    for padded in (ids, garbage):
        model = ternary_llama()
        convert_bitlinear_to_lrc(
            model, init_method="calibrated", batches=[{"input_ids": padded, "attention_mask": mask}]
        )
        made.append(next(lrc_layers(model)))

    assert torch.equal(made[0].lrc_U, made[1].lrc_U)


def test_calibration_leaves_no_hook_and_the_training_mode_as_it_was() -> None:
    model = ternary_llama().train()
    model.model.layers[0].eval()

    convert_bitlinear_to_lrc(model, init_method="calibrated", batches=token_ids(1))

    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.training
    assert not model.model.layers[0].self_attn.q_proj.training
    assert model.model.layers[1].self_attn.q_proj.training


def test_biases_are_kept_and_frozen() -> None:
    model: Any = tiny_qwen2()
    convert_to_bitnet(model)
    bias = model.model.layers[0].self_attn.q_proj.bias

    convert_bitlinear_to_lrc(model, init_method="calibrated", batches=token_ids(1))

    assert model.model.layers[0].self_attn.q_proj.bias is bias
    assert not bias.requires_grad


def test_training_only_the_corrections_lowers_a_loss_and_leaves_the_hash_of_the_rest() -> None:
    model = convert_bitlinear_to_lrc(ternary_llama(), rank=4)
    counts = freeze_model_except_lrc(model)
    teacher, ids = logits(dense_llama()), token_ids(1)[0]

    def frozen_hash() -> str:
        parts = [p.detach().numpy().tobytes() for p in model.parameters() if not p.requires_grad]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    before, losses = frozen_hash(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(20):
        loss = nn.functional.mse_loss(model(ids).logits, teacher)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.7 * losses[0]
    assert frozen_hash() == before
    assert counts["trainable"] == get_lrc_stats(model)["total_lrc_params"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_method": "zeros"}, "init_method: .*svd, calibrated|use one of"),
        ({"init_method": "calibrate"}, "did you mean 'calibrated'"),
        ({"init_method": "calibrated"}, "needs batches"),
        ({"init_method": "calibrated", "batches": []}, "no token"),
        ({"init_method": "calibrated", "batches": [torch.zeros(2, 3)]}, "token ids"),
        ({"batches": [torch.zeros(1, 2, dtype=torch.int64)]}, "only calibrated uses batches"),
        ({"rounds": 1}, "only calibrated uses"),
        ({"rank": 0}, "lrc.rank"),
        ({"rank_percentage": 0.0}, "rank_percentage"),
        ({"bytes_share": 1e-4}, "bytes_share"),
        ({"exclude_names": ["q_porj"]}, "did you mean 'q_proj'"),
        ({"exclude_names": ["layers"]}, "no ternary layer left"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_changes(
    options: dict[str, Any], message: str
) -> None:
    model = ternary_llama()

    with pytest.raises(UserError, match=message):
        convert_bitlinear_to_lrc(model, **options)

    assert not list(lrc_layers(model))


def test_a_dense_and_an_already_corrected_model_are_refused() -> None:
    with pytest.raises(UserError, match=r"no ternary layer left to correct \(found no BitLinear"):
        convert_bitlinear_to_lrc(tiny_llama())
    model = convert_bitlinear_to_lrc(ternary_llama())
    with pytest.raises(UserError, match="corrected already"):
        convert_bitlinear_to_lrc(model)


def test_a_weight_that_is_not_finite_is_refused_by_name() -> None:
    model = ternary_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")

    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        convert_bitlinear_to_lrc(model)
