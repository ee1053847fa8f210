"""The corrected layer: its product, what learns, what stays, and what it costs."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet_arch.bitlinear import BitLinear, BitLinearNoActivationQuant, bitlinears, set_quant_amount
from bitnet_arch.lrc import (
    BitLinearLRC,
    LRCInit,
    chosen_rank,
    freeze_model_except_lrc,
    get_lrc_stats,
)
from bitnet_arch.quant import dequantize_activations, quantize_activations, ternary
from bitnet_arch.sparsity import Sparsity, sparsify
from bitnet_arch.subln import SubLN
from durable import UserError

K, N = 14, 9


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


def on_grid(x: Tensor) -> Tensor:
    return dequantize_activations(*quantize_activations(x))


def tokens() -> Tensor:
    return torch.randn(2, 6, K)


def corrected(**options: object) -> BitLinearLRC:
    """A layer whose correction is not the one that its weight would give."""
    layer = BitLinearLRC(K, N, rank=3, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.lrc_U.normal_()
        layer.lrc_V.normal_()
    return layer


def test_the_product_is_the_ternary_one_plus_the_low_rank_one_of_the_raw_input() -> None:
    layer, x = corrected(bias=True), tokens()

    expected = F.linear(on_grid(x), ternary(layer.weight), layer.bias) + x @ layer.lrc_V @ layer.lrc_U.T

    torch.testing.assert_close(layer(x), expected)


def test_the_correction_comes_after_the_subln_and_before_sparsity_and_quantising() -> None:
    norm = SubLN(K)
    norm.weight = nn.Parameter(torch.randn(K))
    layer, x = corrected(input_norm=norm), tokens()
    layer.sparsity = Sparsity(0.5)
    normed = norm(x)

    expected = F.linear(on_grid(sparsify(normed, layer.sparsity)), ternary(layer.weight))
    expected = expected + normed @ layer.lrc_V @ layer.lrc_U.T

    torch.testing.assert_close(layer(x), expected)


def test_at_lambda_zero_it_is_a_plain_linear_layer_to_the_bit() -> None:
    layer, x = corrected(bias=True), tokens()

    set_quant_amount(layer, 0.0)

    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("amount", [0.3, 1.0])
def test_the_correction_grows_with_lambda_like_the_error_that_it_corrects(amount: float) -> None:
    layer, x = BitLinearLRC(K, N, rank=N), tokens()

    set_quant_amount(layer, amount, activations=True)

    # At full rank the correction is W - Q(W): what is left is the error of the activations alone.
    mixed = layer.weight + amount * (ternary(layer.weight) - layer.weight)
    left = F.linear(amount * (on_grid(x) - x), mixed)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight) + left)


def test_full_rank_leaves_only_the_error_of_quantised_activations() -> None:
    layer, x = BitLinearLRC(K, N, rank=N), tokens()

    error = layer(x) - F.linear(x, layer.weight)

    torch.testing.assert_close(error, F.linear(on_grid(x) - x, ternary(layer.weight)), atol=1e-5, rtol=1e-5)


def test_the_default_start_is_the_best_approximation_of_the_residual() -> None:
    layer = BitLinearLRC(K, N, rank=2)
    residual = layer.weight - ternary(layer.weight)
    left, values, right = torch.linalg.svd(residual)

    torch.testing.assert_close(layer.lrc_U @ layer.lrc_V.T, left[:, :2] * values[:2] @ right[:2])


def test_from_the_default_start_both_factors_have_a_gradient_and_a_loss_falls_in_fifty_steps() -> None:
    dense = nn.Linear(K, N, bias=False)
    layer = BitLinearLRC.from_linear(copy.deepcopy(dense), rank=2)
    optimizer = torch.optim.AdamW([layer.lrc_U, layer.lrc_V], lr=1e-2)
    x = torch.randn(64, K) * torch.logspace(-0.7, 0.7, K)
    losses: list[float] = []

    for _ in range(50):
        loss = F.mse_loss(layer(x), dense(x))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        if not losses:
            assert all(bool((f.grad != 0).any()) for f in (layer.lrc_U, layer.lrc_V) if f.grad is not None)
        losses.append(loss.item())
        optimizer.step()

    assert losses[-1] < 0.7 * losses[0]


def test_the_kaiming_start_changes_nothing_and_still_learns() -> None:
    layer, x = BitLinearLRC(K, N, rank=3), tokens()

    layer.init_factors(LRCInit.kaiming)

    assert torch.equal(layer(x), F.linear(on_grid(x), ternary(layer.weight))) or torch.allclose(
        layer(x), F.linear(on_grid(x), ternary(layer.weight)), atol=1e-6
    )
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), [layer.lrc_U])
    assert bool((gradient != 0).all())


def test_a_residual_of_zero_still_leaves_a_gradient() -> None:
    dense = nn.Linear(4, 4, bias=False)
    nn.init.constant_(dense.weight, 0.5)

    layer = BitLinearLRC.from_linear(dense, rank=2)

    gradients = torch.autograd.grad(layer(torch.randn(3, 4)).square().sum(), [layer.lrc_U, layer.lrc_V])
    assert torch.equal(layer.lrc_U @ layer.lrc_V.T, torch.zeros(4, 4))
    assert any(bool((gradient != 0).any()) for gradient in gradients)


def test_gradients_reach_the_layers_below_through_the_ternary_path() -> None:
    layer, x = corrected(), tokens().requires_grad_()
    upstream = torch.randn(2, 6, N)

    (gradient,) = torch.autograd.grad(layer(x), x, upstream)

    torch.testing.assert_close(gradient, upstream @ (ternary(layer.weight) + layer.lrc_U @ layer.lrc_V.T))


def test_gradients_of_the_factors_are_those_of_a_plain_product() -> None:
    layer, x = corrected(), tokens()
    upstream = torch.randn(2, 6, N)
    rows, ups = x.flatten(0, 1), upstream.flatten(0, 1)

    grad_U, grad_V = torch.autograd.grad(layer(x), [layer.lrc_U, layer.lrc_V], upstream)

    torch.testing.assert_close(grad_U, ups.T @ (rows @ layer.lrc_V))
    torch.testing.assert_close(grad_V, rows.T @ (ups @ layer.lrc_U))


def test_only_the_factors_learn_and_the_frozen_part_keeps_its_bits() -> None:
    model = nn.Sequential(
        nn.Linear(K, K), BitLinearLRC(K, N, bias=True, input_norm=SubLN(K)), nn.Linear(N, 2)
    )
    counts = freeze_model_except_lrc(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(model(tokens()).square().sum())
        optimizer.step()

    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.lrc_U", "1.lrc_V"}
    assert counts == {"trainable": K + N, "frozen": K * K + K + K * N + N + K + 2 * N + 2}


def test_tied_parameters_are_counted_once_when_freezing() -> None:
    model = nn.Sequential(nn.Linear(K, K, bias=False), nn.Linear(K, K, bias=False), BitLinearLRC(K, N))
    model[1].weight = model[0].weight

    assert freeze_model_except_lrc(model)["frozen"] == K * K + K * N


def test_freezing_a_model_without_corrections_is_refused() -> None:
    with pytest.raises(UserError, match="no low-rank correction"):
        freeze_model_except_lrc(nn.Sequential(BitLinear(4, 3)))


def test_a_layer_is_born_frozen_but_for_its_factors() -> None:
    trainable = {name for name, p in BitLinearLRC(K, N, bias=True).named_parameters() if p.requires_grad}

    assert trainable == {"lrc_U", "lrc_V"}


def test_the_state_holds_no_second_copy_of_the_weight() -> None:
    assert BitLinearLRC(K, N).state_dict().keys() == {"weight", "lrc_U", "lrc_V"}


def test_a_loaded_or_edited_weight_is_seen_at_the_next_forward() -> None:
    layer, x = corrected(), tokens()
    layer(x)
    other = corrected()

    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), other(x))

    with torch.no_grad():
        layer.weight.neg_()
    expected = F.linear(on_grid(x), ternary(-other.weight)) + x @ other.lrc_V @ other.lrc_U.T
    torch.testing.assert_close(layer(x), expected)


def test_it_is_a_ternary_layer_for_everybody_who_asks() -> None:
    model = nn.Sequential(BitLinearLRC(K, N))

    assert [type(layer) for layer in bitlinears(model)] == [BitLinearLRC]


@pytest.mark.parametrize("kind", [BitLinear, BitLinearNoActivationQuant])
def test_taking_over_a_ternary_layer_keeps_all_that_was_set_on_it(kind: type[BitLinear]) -> None:
    source = kind(K, N, bias=True, input_norm=SubLN(K), dtype=torch.bfloat16)
    source.quant_amount, source.subln_amount = 0.25, 0.5
    source.sparsity, source.backward_dtype = Sparsity(0.5, block=4), torch.bfloat16
    source.eval()

    layer = BitLinearLRC.from_bitlinear(source, rank=2)
    layer.init_factors()

    public = {name: value for name, value in vars(source).items() if not name.startswith("_")}
    assert {name: getattr(layer, name) for name in public} == public
    assert layer.quantizes_activations is source.quantizes_activations
    assert layer.weight is source.weight
    assert layer.bias is source.bias
    assert layer.input_norm is source.input_norm
    assert layer.lrc_U.dtype == layer.lrc_V.dtype == torch.bfloat16
    x = tokens().bfloat16()
    correction = 0.25 * F.linear(F.linear(source.normalized(x), layer.lrc_V.T), layer.lrc_U)
    torch.testing.assert_close(layer(x), source(x) + correction)


def test_a_layer_without_activation_quantisation_never_gets_any() -> None:
    layer = BitLinearLRC.from_bitlinear(BitLinearNoActivationQuant(K, N), rank=2)

    set_quant_amount(layer, 1.0)

    assert layer.activation_amount == 0


def test_factors_may_be_stored_in_another_dtype() -> None:
    layer, x = BitLinearLRC(K, N, rank=3, lrc_dtype=torch.bfloat16), tokens()

    expected = F.linear(on_grid(x), ternary(layer.weight)) + x @ layer.lrc_V.float() @ layer.lrc_U.float().T

    assert layer.lrc_U.dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), expected)


def test_autocast_gives_the_low_dtype_and_stays_close() -> None:
    layer, x = corrected(), tokens()

    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)

    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), layer(x), atol=0.15, rtol=0.02)


def test_it_compiles_without_a_graph_break_over_a_ramp_of_lambda() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    layer, x = corrected(), tokens()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)

    for amount in (0, 0.1, 0.2, 0.3, 0.5, 0.8, 0.9, 1):
        set_quant_amount(layer, amount)
        torch.testing.assert_close(compiled(x), layer(x))

    assert counter.frame_count <= 3


def test_factors_lie_where_the_weight_lies_and_nothing_is_computed_without_data() -> None:
    born = BitLinearLRC(K, N, rank=3, device="meta")
    taken_over = BitLinearLRC.from_bitlinear(BitLinear(K, N, device="meta"), rank=3)

    for layer in (born, taken_over):
        layer.init_factors()
        assert layer.lrc_U.is_meta
        assert layer.lrc_V.is_meta
        assert layer.lrc_V.shape == (K, 3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 12),
        ({"rank_percentage": 0.7}, 89),
        ({"rank_percentage": 1e-6}, 1),
        ({"rank": 5, "rank_percentage": 0.5}, 5),
        ({"rank": 128}, 128),
        # 128·256 weights are 8,192 bytes at two bits; one rank costs (128 + 256)·2 in 16 bits.
        ({"bytes_share": 0.1, "bytes_per_element": 2}, 1),
        ({"bytes_share": 0.5, "bytes_per_element": 2}, 5),
        ({"bytes_share": 0.5, "bytes_per_element": 4}, 2),
        ({"bytes_share": 99.0, "bytes_per_element": 4}, 128),
    ],
)
def test_the_rank_follows_from_what_was_asked(options: dict[str, float], expected: int) -> None:
    assert chosen_rank(128, 256, **options) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "1 to 128"),
        ({"rank": 129}, "1 to 128"),
        ({"rank_percentage": 0.0}, "rank_percentage"),
        ({"rank_percentage": 1.5}, "rank_percentage"),
        ({"bytes_share": 0.01, "bytes_per_element": 2}, "at least 0.0938"),
    ],
)
def test_a_rank_that_cannot_be_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen_rank(128, 256, **options)  # type: ignore[arg-type]


def test_the_stats_count_parameters_and_bytes_once() -> None:
    model = nn.Sequential(
        BitLinearLRC(K, N, rank=2, bias=True), BitLinearLRC(N, 5, rank=3, lrc_dtype=torch.bfloat16)
    )

    stats = get_lrc_stats(model)

    assert stats == {
        "num_lrc_layers": 2,
        "total_lrc_params": 2 * (K + N) + 3 * (N + 5),
        "total_frozen_params": K * N + N + N * 5,
        "average_rank": 2.5,
        "ranks": [2, 3],
        "lrc_bytes": 4 * 2 * (K + N) + 2 * 3 * (N + 5),
        "ternary_bytes": (K * N + 3) // 4 + 4 + (N * 5 + 3) // 4 + 4,
    }


def test_the_stats_of_a_model_without_corrections_are_zero() -> None:
    stats = get_lrc_stats(nn.Linear(3, 2))

    assert stats["num_lrc_layers"] == 0
    assert stats["average_rank"] == 0.0
