"""Q-Sparse: which activations stay, what the gradient sees, and that masking commutes with quantising."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from bitnet_arch.quant import dequantize_activations, quantize_activations
from bitnet_arch.sparsity import Sparsity, block_sparsify, count_kept, sparsify, topk_sparsify
from durable import UserError


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, 14, generator=torch.Generator().manual_seed(7))


def test_the_three_largest_of_five_stay() -> None:
    token = torch.tensor([1.0, -5.0, 2.0, -3.0, 0.5])

    torch.testing.assert_close(topk_sparsify(token, 0.4), torch.tensor([0.0, -5.0, 2.0, -3.0, 0.0]))


def test_the_block_form_keeps_the_largest_of_every_block() -> None:
    token = torch.tensor([1.0, -5.0, 2.0, -3.0, 0.5, 0.1, -0.2, 0.3])

    torch.testing.assert_close(
        block_sparsify(token, keep=2, block=4), torch.tensor([0.0, -5.0, 0.0, -3.0, 0.5, 0.0, 0.0, 0.3])
    )


def test_a_width_that_blocks_do_not_divide_is_padded_then_cut() -> None:
    token = torch.arange(1.0, 11.0)

    kept = block_sparsify(token, keep=2, block=4)

    torch.testing.assert_close(kept, torch.tensor([0.0, 0, 3, 4, 0, 0, 7, 8, 9, 10]))


def test_a_last_block_narrower_than_what_is_kept_keeps_all_of_it_even_zeros_and_signs() -> None:
    token = torch.tensor([4.0, 3.0, 2.0, 1.0, -0.5])

    torch.testing.assert_close(
        block_sparsify(token, keep=3, block=4), torch.tensor([4.0, 3.0, 2.0, 0.0, -0.5])
    )


@pytest.mark.parametrize(
    ("ratio", "width", "expected"),
    [(0.4, 5, 3), (0.9, 20, 2), (0.7, 10, 3), (0.61, 64, 24), (0.5, 7, 3), (0.999, 8, 1), (0.8, 5, 1)],
)
def test_the_count_is_the_exact_product_rounded_down_not_a_float_accident(
    ratio: float, width: int, expected: int
) -> None:
    assert count_kept(ratio, width) == expected


def test_the_count_agrees_with_integer_arithmetic_at_every_per_cent() -> None:
    for per_cent in range(100):
        for width in (5, 10, 48, 64, 100, 576, 1536):
            assert count_kept(per_cent / 100, width) == max(1, (100 - per_cent) * width // 100)


def test_every_token_keeps_exactly_k_even_among_equals() -> None:
    equal = torch.ones(4, 10)

    kept = topk_sparsify(equal, 0.5)

    assert (kept != 0).sum(-1).tolist() == [5, 5, 5, 5]
    assert kept[0].tolist() == [1.0] * 5 + [0.0] * 5, "among equals the first ones win, on every machine"


def test_tokens_do_not_touch_each_other(x: Tensor) -> None:
    alone = torch.stack([topk_sparsify(token, 0.6) for token in x.flatten(0, 1)]).view_as(x)

    assert torch.equal(topk_sparsify(x, 0.6), alone)


@pytest.mark.parametrize("off", [None, Sparsity(0.0), Sparsity(0.0, block=4)])
def test_ratio_zero_is_the_identity_to_the_bit(x: Tensor, off: Sparsity | None) -> None:
    assert sparsify(x, off) is x


@pytest.mark.parametrize("sparsity", [Sparsity(0.5), Sparsity(0.5, block=4), Sparsity(0.75, block=32)])
def test_the_gradient_reaches_every_element(x: Tensor, sparsity: Sparsity) -> None:
    x.requires_grad_()
    upstream = torch.randn(x.shape)

    (gradient,) = torch.autograd.grad(sparsify(x, sparsity), x, upstream)

    assert torch.equal(gradient, upstream)


@pytest.mark.parametrize("sparsity", [Sparsity(0.61), Sparsity(0.5, block=4)])
def test_sparsify_then_quantise_equals_the_papers_mask_of_the_quantised(
    x: Tensor, sparsity: Sparsity
) -> None:
    mask = sparsify(x, sparsity) != 0

    ours = dequantize_activations(*quantize_activations(sparsify(x, sparsity)), torch.float32)

    papers = dequantize_activations(*quantize_activations(x), torch.float32) * mask
    assert torch.equal(ours, papers)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sparsity", [Sparsity(0.9), Sparsity(0.5, block=4)])
def test_what_is_not_finite_passes_through(x: Tensor, bad: float, sparsity: Sparsity) -> None:
    x[1, 2, 3] = bad
    before = x.clone()

    kept = sparsify(x, sparsity)

    torch.testing.assert_close(kept[1, 2, 3], before[1, 2, 3], equal_nan=True)
    assert kept.isfinite().sum() == x.numel() - 1, "the other elements stay as they were or become zero"


def test_a_token_of_infinities_stays_visible_although_few_places_are_free() -> None:
    assert not topk_sparsify(torch.full((6,), float("inf")), 0.5).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_stays(x: Tensor, dtype: torch.dtype) -> None:
    kept = topk_sparsify(x.to(dtype), 0.5)

    assert kept.dtype == dtype
    assert ((kept != 0).sum(-1) == 7).all()


@pytest.mark.parametrize("sparsity", [Sparsity(0.5), Sparsity(0.5, block=4)])
def test_it_compiles_without_a_break_and_gives_the_same(x: Tensor, sparsity: Sparsity) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: sparsify(t, sparsity) * 2, fullgraph=True, backend="aot_eager")
    x.requires_grad_()

    y = compiled(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)

    assert torch.equal(y, sparsify(x, sparsity) * 2)
    assert torch.equal(gradient, torch.full_like(x, 2))


def test_a_ramp_of_the_ratio_compiles_once_and_not_once_per_value(x: Tensor) -> None:
    class Layer(nn.Module):
        sparsity: Sparsity | None = None

        def forward(self, t: Tensor) -> Tensor:
            return sparsify(t, self.sparsity)

    counter = CompileCounterWithBackend("aot_eager")

    for block in (None, 4):
        torch._dynamo.reset()
        counter.clear()
        layer = Layer()
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for percent in range(1, 90, 4):
            layer.sparsity = Sparsity(percent / 100, block)
            assert torch.equal(compiled(x), sparsify(x, layer.sparsity))

        assert counter.frame_count <= 2, "the first value is taken for a constant, the second is not"


@pytest.mark.parametrize("sparsity", [Sparsity(0.5), Sparsity(0.5, block=4)])
def test_per_example_gradients_by_torch_func_equal_a_loop(x: Tensor, sparsity: Sparsity) -> None:
    weight = torch.randn(14, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(8))

    def loss(w: Tensor, example: Tensor) -> Tensor:
        return (sparsify(example @ w @ w.T, sparsity) ** 2).sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x.double())

    one_by_one = torch.stack([torch.func.grad(loss)(weight, example) for example in x.double()])
    torch.testing.assert_close(together, one_by_one)


def test_autocast_changes_nothing(x: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        kept = topk_sparsify(x, 0.5)

    assert torch.equal(kept, topk_sparsify(x, 0.5))


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_a_ratio_out_of_range_is_refused_with_the_range(x: Tensor, ratio: float) -> None:
    with pytest.raises(UserError, match=r"sparsity\.ratio: .*at least 0 and below 1"):
        Sparsity(ratio)
    with pytest.raises(UserError, match=r"sparsity\.ratio"):
        topk_sparsify(x, ratio)


@pytest.mark.parametrize("block", [1, 0, -4])
def test_a_block_that_leaves_no_choice_is_refused(block: int) -> None:
    with pytest.raises(UserError, match=r"sparsity\.block: .*2 or more"):
        Sparsity(0.5, block)


@pytest.mark.parametrize("keep", [0, 5])
def test_keeping_none_or_more_than_a_block_is_refused(x: Tensor, keep: int) -> None:
    with pytest.raises(UserError, match="keep 1 to 4"):
        block_sparsify(x, keep=keep, block=4)
