"""BitLinear inside the tools people train with: torch.compile, torch.func, checkpointing, autocast."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from bitnet_arch.bitlinear import BitLinear, set_quant_amount, set_sparsity, set_subln_amount
from bitnet_arch.sparsity import Sparsity
from bitnet_arch.subln import SubLN


class Block(nn.Module):
    """A small transformer block: shared inputs, SubLN before the output projections, a bias."""

    def __init__(self, width: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.q = BitLinear(width, width, bias=True)
        self.k, self.v = BitLinear(width, width), BitLinear(width, width)
        self.o = BitLinear(width, width, input_norm=SubLN(width))
        self.gate, self.up = BitLinear(width, hidden), BitLinear(width, hidden)
        self.down = BitLinear(hidden, width, input_norm=SubLN(hidden))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).unsqueeze(1) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        y: Tensor = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return y


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def make_block() -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    return Block(), torch.randn(2, 7, 32)


def parameter_grads(block: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in block.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("has_grad", [True, False])
def test_a_whole_ramp_compiles_at_most_three_times_without_a_graph_break(has_grad: bool) -> None:
    block, x = make_block()
    twin = Block()
    twin.load_state_dict(block.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(block, backend=counter, fullgraph=True)

    with torch.set_grad_enabled(has_grad):
        for step in range(22):
            for model in (block, twin):
                # The two dials arrive at different steps.
                set_quant_amount(model, min(1.0, step / 20))
                set_subln_amount(model, min(1.0, step / 15))
            # Ties at .5 make single codes of activations differ when a fused kernel rounds differently.
            torch.testing.assert_close(compiled(x), twin(x), rtol=1e-3, atol=1e-3)

    assert counter.frame_count <= 3


def test_compiled_gradients_equal_eager_ones() -> None:
    block, x = make_block()
    for amount in (0.0, 0.5, 1.0):
        set_quant_amount(block, amount)
        set_subln_amount(block, amount)
        block.zero_grad()
        block(x).square().mean().backward()
        expected = [gradient.clone() for gradient in parameter_grads(block)]
        block.zero_grad()

        torch.compile(block, backend="aot_eager", fullgraph=True)(x).square().mean().backward()

        for found, wanted in zip(parameter_grads(block), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


def test_a_compiled_step_sees_the_weights_of_the_last_optimizer_step() -> None:
    block, x = make_block()
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.05, fused=True)
    compiled: Any = torch.compile(block, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        compiled(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

        torch.testing.assert_close(compiled(x), block(x), rtol=1e-3, atol=1e-3)


def test_a_compiled_block_keeps_int8_only_where_it_cannot_round_again() -> None:
    block, x = make_block()
    compiled: Any = torch.compile(block, backend="aot_eager_decomp_partition", fullgraph=True)
    kept: list[tuple[int, ...]] = []

    def remember(value: Tensor) -> Tensor:
        if value.dtype == torch.int8 and value.shape[0] == x[..., 0].numel():  # by token
            kept.append(tuple(value.shape))
        return value

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda value: value):
        compiled(x.requires_grad_())

    # The output of attention. The others follow from what the norms and the gate keep anyway.
    assert kept == [(14, 32)]


@pytest.mark.slow
def test_generated_kernels_give_the_eager_result() -> None:
    block, x = make_block()
    block(x).square().mean().backward()
    expected_y, expected = block(x), [gradient.clone() for gradient in parameter_grads(block)]
    block.zero_grad()

    compiled: Any = torch.compile(block, fullgraph=True)
    y = compiled(x)
    y.square().mean().backward()

    torch.testing.assert_close(y, expected_y, rtol=1e-3, atol=1e-3)
    for found, wanted in zip(parameter_grads(block), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("amount", [0.0, 0.5, 1.0])
def test_per_example_gradients_equal_a_loop(amount: float) -> None:
    block, _ = make_block()
    set_quant_amount(block, amount)
    set_subln_amount(block, amount)
    x, target = torch.randn(5, 7, 32), torch.randn(5, 7, 32)
    parameters = {name: value.detach() for name, value in block.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        y: Tensor = functional_call(block, weights, (x.unsqueeze(0),))
        return (y.squeeze(0) - target).square().mean()

    together = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, target)

    for index in range(len(x)):
        block.zero_grad()
        (block(x[index : index + 1])[0] - target[index]).square().mean().backward()
        for name, parameter in block.named_parameters():
            # At μ = 0 the norm's gain has no part in the result.
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(together[name][index], expected, rtol=1e-4, atol=1e-6)


def test_an_ensemble_of_weights_equals_a_loop() -> None:
    torch.manual_seed(1)
    layer = BitLinear(12, 5)
    weights, x = torch.randn(3, 5, 12), torch.randn(4, 12)

    together = vmap(lambda weight: functional_call(layer, {"weight": weight}, (x,)))(weights)

    for index, weight in enumerate(weights):
        torch.testing.assert_close(together[index], functional_call(layer, {"weight": weight}, (x,)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_gradients_are_the_same_bits(use_reentrant: bool) -> None:
    block, x = make_block()
    x.requires_grad_()
    block(x).square().mean().backward()
    expected = [gradient.clone() for gradient in parameter_grads(block)]
    block.zero_grad()

    checkpoint(block, x, use_reentrant=use_reentrant).square().mean().backward()

    for found, wanted in zip(parameter_grads(block), expected, strict=True):
        assert torch.equal(found, wanted)


def test_autocast_stays_close_to_full_precision_and_keeps_fp32_gradients() -> None:
    block, x = make_block()
    expected = block(x)

    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    y.float().square().mean().backward()

    assert {gradient.dtype for gradient in parameter_grads(block)} == {torch.float32}
    # Eight layers deep, a few bf16 roundings and re-drawn int8 roundings.
    assert float(((y - expected).norm() / expected.norm()).detach()) < 0.03


def test_sparsity_compiles_without_a_graph_break() -> None:
    block, x = make_block()
    set_sparsity(block, Sparsity(0.5))

    compiled: Any = torch.compile(block, backend="aot_eager", fullgraph=True)

    torch.testing.assert_close(compiled(x), block(x), rtol=1e-3, atol=1e-3)


def test_training_lowers_a_loss() -> None:
    block, x = make_block()
    target = torch.randn(2, 7, 32)
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        loss = (block(x) - target).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert losses[-1] < 0.7 * losses[0]
