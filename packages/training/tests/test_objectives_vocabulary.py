"""Losses over the vocabulary in chunks have the value and the gradient that torch gives for all logits at
once, and hold less.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bitnet_arch import BitLinear
from wrinklefree.objectives.continue_pretrain import cross_entropy
from wrinklefree.objectives.divergence import Comparison
from wrinklefree.objectives.head import Head
from wrinklefree.objectives.vocabulary import Group, TokenLoss, chunks, weighted_sum

N, D, V = 11, 6, 17


class CrossEntropy:
    """The loss of continued pretraining on given labels."""

    def __init__(self, labels: Tensor, label_smoothing: float = 0.0) -> None:
        self.labels, self.label_smoothing = labels, label_smoothing

    def __call__(self, logits: Tensor, tokens: slice, /, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
        return cross_entropy(
            logits, self.labels[tokens], label_smoothing=self.label_smoothing, gradient=gradient
        )


class Distillation:
    """KL from given logits of a teacher."""

    def __init__(self, teacher: Tensor, temperature: float, scale: float) -> None:
        self.teacher = teacher
        self.comparison = Comparison(wanted_by="logits_distill", temperature=temperature, scale=scale)

    def __call__(self, logits: Tensor, tokens: slice, /, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
        return self.comparison.of_logits(logits, self.teacher[tokens], gradient=gradient)


def plain(dtype: torch.dtype) -> Head:
    return Head(nn.Linear(D, V, bias=False, dtype=dtype))


def with_bias(dtype: torch.dtype) -> Head:
    return Head(nn.Linear(D, V, dtype=dtype))


def soft_capped(dtype: torch.dtype) -> Head:
    return Head(nn.Linear(D, V, bias=False, dtype=dtype), softcap=0.7)


def hooked(dtype: torch.dtype) -> Head:
    linear = nn.Linear(D, V, dtype=dtype)
    linear.register_forward_hook(lambda module, inputs, output: 3 * output)
    return Head(linear)


def ternary(dtype: torch.dtype) -> Head:
    return Head(BitLinear(D, V, bias=True, dtype=dtype))


HEADS = [plain, with_bias, soft_capped, hooked, ternary]


def chunked(
    head: Head, hidden: Tensor, losses: list[TokenLoss], factors: list[float], chunk_tokens: int = 4
) -> tuple[Tensor, Tensor]:
    group = Group(num_tokens=len(hidden), losses=losses, factors=factors, members=range(len(losses)))
    return weighted_sum(hidden, head, [group], chunk_tokens=chunk_tokens)


def gradients(head: Head, hidden: Tensor, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [hidden, *head.module.parameters()]))


@pytest.fixture
def hidden() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(N, D, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("make_head", HEADS)
def test_cross_entropy_is_that_of_torch(
    make_head: Callable[[torch.dtype], Head], label_smoothing: float, hidden: Tensor, labels: Tensor
) -> None:
    head = make_head(torch.float64)
    expected = F.cross_entropy(head(hidden), labels, reduction="sum", label_smoothing=label_smoothing)

    loss, sums = chunked(head, hidden, [CrossEntropy(labels, label_smoothing)], [1.0])

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(sums[0], expected.detach())
    torch.testing.assert_close(gradients(head, hidden, 2 * loss), gradients(head, hidden, 2 * expected))


@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (2.5, 6.25), (5.0, 1.0)])
@pytest.mark.parametrize("make_head", HEADS)
def test_distillation_is_the_divergence_of_softened_distributions(
    make_head: Callable[[torch.dtype], Head], temperature: float, scale: float, hidden: Tensor
) -> None:
    head = make_head(torch.float64)
    teacher = 3 * torch.randn(N, V, dtype=torch.float64)
    p, q = (torch.softmax(logits / temperature, dim=-1) for logits in (teacher, head(hidden)))
    expected = scale * (p * (p / q).log()).sum()

    loss, _ = chunked(head, hidden, [Distillation(teacher, temperature, scale)], [1.0])

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(head, hidden, loss), gradients(head, hidden, expected))


def test_rows_beyond_the_teachers_vocabulary_are_no_part_of_the_comparison(hidden: Tensor) -> None:
    head, teacher = plain(torch.float64), torch.randn(N, V - 2, dtype=torch.float64)
    ours = F.log_softmax(head(hidden)[:, : V - 2], dim=-1)
    expected = F.kl_div(ours, F.log_softmax(teacher, dim=-1), log_target=True, reduction="sum")

    loss, _ = chunked(head, hidden, [Distillation(teacher, 1.0, 1.0)], [1.0])

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(head, hidden, loss), gradients(head, hidden, expected))


def test_a_token_that_the_teacher_rules_out_counts_nothing(hidden: Tensor) -> None:
    head, teacher = plain(torch.float64), torch.randn(N, V, dtype=torch.float64)
    teacher[:, 3] = -torch.inf
    p, q = torch.softmax(teacher, dim=-1), torch.softmax(head(hidden), dim=-1)
    rest = [token for token in range(V) if token != 3]
    expected = (p[:, rest] * (p[:, rest] / q[:, rest]).log()).sum()

    loss, _ = chunked(head, hidden, [Distillation(teacher, 1.0, 1.0)], [1.0])

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(head, hidden, loss), gradients(head, hidden, expected))


def test_two_losses_share_a_pass(hidden: Tensor, labels: Tensor) -> None:
    head, teacher = with_bias(torch.float64), torch.randn(N, V, dtype=torch.float64)
    logits = head(hidden)
    entropy = F.cross_entropy(logits, labels, reduction="sum")
    divergence = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum")
    expected = 0.25 * entropy + 1.5 * divergence

    both: list[TokenLoss] = [CrossEntropy(labels), Distillation(teacher, 1.0, 1.0)]
    loss, sums = chunked(head, hidden, both, [0.25, 1.5])

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(sums, torch.stack([entropy, divergence]).detach())
    torch.testing.assert_close(gradients(head, hidden, loss), gradients(head, hidden, expected))


def test_backward_can_be_asked_twice(hidden: Tensor, labels: Tensor) -> None:
    head = plain(torch.float64)
    loss, _ = chunked(head, hidden, [CrossEntropy(labels)], [1.0])

    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss, hidden)[0]

    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("make_head", [plain, ternary])
def test_without_gradients_there_is_a_value_and_no_graph(
    make_head: Callable[[torch.dtype], Head], hidden: Tensor, labels: Tensor
) -> None:
    head = make_head(torch.float64)
    expected, _ = chunked(head, hidden, [CrossEntropy(labels)], [1.0])

    with torch.no_grad():
        loss, _ = chunked(head, hidden, [CrossEntropy(labels)], [1.0])

    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("make_head", [with_bias, ternary])
def test_a_frozen_head_gets_no_gradient(
    make_head: Callable[[torch.dtype], Head], hidden: Tensor, labels: Tensor
) -> None:
    head = make_head(torch.float64)
    expected = torch.autograd.grad(F.cross_entropy(head(hidden), labels, reduction="sum"), hidden)[0]
    head.module.requires_grad_(False)

    loss, _ = chunked(head, hidden, [CrossEntropy(labels)], [1.0])
    loss.backward()

    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, expected)
    assert all(parameter.grad is None for parameter in head.module.parameters())


@pytest.mark.parametrize("make_head", [plain, ternary])
def test_no_tokens_give_zero_with_a_graph(make_head: Callable[[torch.dtype], Head], hidden: Tensor) -> None:
    head, none = make_head(torch.float64), torch.empty(0, dtype=torch.int64)

    loss, _ = chunked(head, hidden[:0], [CrossEntropy(none)], [1.0])
    loss.backward()

    assert loss.item() == 0
    for parameter in (hidden, *head.module.parameters()):
        assert parameter.grad is not None
        assert not parameter.grad.any()


@pytest.mark.parametrize("make_head", [with_bias, hooked])
def test_under_autocast_products_are_bf16_and_statistics_float32(
    make_head: Callable[[torch.dtype], Head], hidden: Tensor, labels: Tensor
) -> None:
    head = make_head(torch.float32)
    states = hidden.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.cross_entropy(head(states).float(), labels, reduction="sum")
        loss, _ = chunked(head, states, [CrossEntropy(labels)], [1.0])

    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(gradients(head, states, loss), gradients(head, states, expected), strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        # Two roundings to bf16's 8 bits, and the sums over N of what they leave.
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7 * theirs.abs().max().item())


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return output


@pytest.mark.parametrize("make_head", HEADS)
def test_no_tensor_is_larger_than_a_chunk_of_logits(make_head: Callable[[torch.dtype], Head]) -> None:
    torch.manual_seed(0)
    num_tokens, chunk_tokens = 200, 20
    head = make_head(torch.float32)
    states = torch.randn(num_tokens, D, requires_grad=True)
    labels, teacher = torch.randint(0, V, (num_tokens,)), nn.Linear(D, V).requires_grad_(False)
    comparison = Comparison(wanted_by="logits_distill", temperature=2.0, scale=4.0)

    def distillation(logits: Tensor, tokens: slice, /, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
        given = teacher(states[tokens].detach())
        return comparison.of_logits(logits, given, gradient=gradient)

    with LargestTensor() as mode:
        loss, _ = chunked(head, states, [CrossEntropy(labels), distillation], [1.0, 1.0], chunk_tokens)
        loss.backward()

    assert mode.num_elements == max(chunk_tokens * V, num_tokens * D)


@pytest.mark.parametrize(("num_tokens", "chunk_tokens"), [(0, 3), (1, 3), (3, 3), (10, 4), (4096, 655)])
def test_chunks_cover_all_tokens_once_in_equal_parts(num_tokens: int, chunk_tokens: int) -> None:
    covered = [token for part in chunks(num_tokens, chunk_tokens) for token in range(part.start, part.stop)]
    sizes = [part.stop - part.start for part in chunks(num_tokens, chunk_tokens)]

    assert covered == list(range(num_tokens))
    assert all(size <= chunk_tokens for size in sizes)
    assert len(sizes) == -(-num_tokens // chunk_tokens)
