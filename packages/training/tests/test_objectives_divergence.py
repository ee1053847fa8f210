"""Divergences from a teacher's distribution have the value of their formula and the gradient of autograd."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from durable import UserError
from wrinklefree.objectives.divergence import Comparison, Divergence
from wrinklefree.teachers.base import TopK

C, V, S = 7, 11, 13
CONFIDENCE = 4


@pytest.fixture
def student() -> Tensor:
    """Logits of more tokens than the teacher has."""
    torch.manual_seed(1)
    return torch.randn(C, S, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def teacher() -> Tensor:
    """Some rows nearly sure, some nearly even."""
    torch.manual_seed(2)
    return torch.randn(C, V, dtype=torch.float64) * torch.linspace(0.1, 8, C)[:, None]


def outcomes(
    student: Tensor, teacher: Tensor, temperature: float, top_k: int | None
) -> tuple[Tensor, Tensor]:
    """Probabilities of the student's and the teacher's outcomes, with a graph."""
    q, p = (torch.softmax(logits / temperature, dim=-1) for logits in (student[:, :V], teacher))
    if top_k is None:
        return q, p
    listed = torch.zeros(C, V, dtype=torch.bool).scatter(1, p.topk(top_k).indices, True)
    return tuple(  # type: ignore[return-value]
        torch.cat([each[listed].view(C, top_k), (each * ~listed).sum(1, keepdim=True)], dim=1)
        for each in (q, p)
    )


def expected(q: Tensor, p: Tensor, divergence: str) -> Tensor:
    """From the formulas of the papers."""
    forward, reverse = (p * (p / q).log()).sum(1), (q * (q / p).log()).sum(1)
    entropy = -(p * p.log()).sum(1)
    share = (1 - entropy / math.log(CONFIDENCE)).clamp(0, 1)
    mixed = share * reverse + (1 - share) * forward
    return {"forward": forward, "reverse": reverse, "adaptive": mixed}[divergence].sum()


def compared(
    logits: Tensor, told: Tensor | TopK, *, gradient: bool = True, **options: Any
) -> tuple[Tensor, Tensor]:
    comparison = Comparison(wanted_by="logits_distill", confidence_k=CONFIDENCE, **options)
    loss = comparison.token_loss(lambda tokens: told, V)
    total, found = loss(logits.detach(), slice(0, C), gradient=gradient)
    return total, torch.empty(0) if found is None else found


@pytest.mark.parametrize("divergence", Divergence)
@pytest.mark.parametrize("top_k", [None, 1, 4])
@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (2.5, 6.25)])
def test_value_and_gradient_are_those_of_the_formula(
    divergence: Divergence,
    top_k: int | None,
    temperature: float,
    scale: float,
    student: Tensor,
    teacher: Tensor,
) -> None:
    value = scale * expected(*outcomes(student, teacher, temperature, top_k), divergence)
    (slope,) = torch.autograd.grad(value, student)

    options: dict[str, Any] = {
        "divergence": divergence,
        "top_k": top_k,
        "temperature": temperature,
        "scale": scale,
    }
    total, gradient = compared(student, teacher, **options)
    without, none = compared(student, teacher, gradient=False, **options)

    torch.testing.assert_close(total, value.detach())
    torch.testing.assert_close(gradient, slope)
    torch.testing.assert_close(without, total, rtol=0, atol=0)
    assert not none.numel()


def test_two_tokens_by_hand() -> None:
    """KL of (¼, ¾) and (½, ½): ¼ ln ½ + ¾ ln 1.5; the same at τ = 2 from twice the logits, times τ²."""
    even, teacher = torch.zeros(1, 2), torch.tensor([[0.0, math.log(3)]])
    plain, softened = (
        Comparison(wanted_by="logits_distill", temperature=temperature, scale=temperature**2)
        for temperature in (1.0, 2.0)
    )

    assert plain.of_logits(even, teacher, gradient=False)[0].item() == pytest.approx(0.13081, abs=5e-6)
    assert softened.of_logits(even, 2 * teacher, gradient=False)[0].item() == pytest.approx(0.52325, abs=5e-6)


@pytest.mark.parametrize("divergence", Divergence)
def test_all_tokens_as_top_k_are_the_whole_vocabulary(
    divergence: Divergence, student: Tensor, teacher: Tensor
) -> None:
    whole, slope = compared(student, teacher, divergence=divergence)
    log_probs = teacher.log_softmax(-1)
    order = log_probs.argsort(descending=True)

    for told in (teacher, TopK(order, log_probs.gather(1, order))):
        total, gradient = compared(student, told, divergence=divergence, top_k=V)
        torch.testing.assert_close(total, whole)
        torch.testing.assert_close(gradient, slope)


@pytest.mark.parametrize("divergence", [Divergence.forward, Divergence.reverse])
def test_more_tokens_tell_more(divergence: Divergence, student: Tensor, teacher: Tensor) -> None:
    sizes = range(1, V)  # with all but one, the others are one token, too
    totals = [compared(student, teacher, divergence=divergence, top_k=size)[0].item() for size in sizes]

    assert all(fewer < more for fewer, more in itertools.pairwise(totals))


@pytest.mark.parametrize("divergence", Divergence)
def test_a_teacher_that_tells_its_top_k_is_worth_as_much_as_its_logits(
    divergence: Divergence, student: Tensor, teacher: Tensor
) -> None:
    log_probs, ids = teacher.log_softmax(-1).topk(6)
    # The order is the teacher's business, and so are places that it had nothing for.
    nothing = torch.full((C, 2), -torch.inf, dtype=torch.float64)
    told = TopK(
        torch.cat([torch.zeros(C, 2, dtype=torch.int64), ids.flip(1)], dim=1),
        torch.cat([nothing, log_probs.flip(1)], dim=1),
    )

    for top_k in (None, 3):
        exact, slope = compared(student, teacher, divergence=divergence, top_k=top_k or 6)
        total, gradient = compared(student, told, divergence=divergence, top_k=top_k)
        torch.testing.assert_close(total, exact)
        torch.testing.assert_close(gradient, slope)


def test_a_top_k_is_not_softened(student: Tensor, teacher: Tensor) -> None:
    log_probs, ids = teacher.log_softmax(-1).topk(3)

    with pytest.raises(UserError, match=r"^objectives\.logits_distill\.temperature: .*found 2\.0") as refused:
        compared(student, TopK(ids, log_probs), temperature=2.0)

    assert refused.value.exit_code == 2


@pytest.mark.parametrize("divergence", Divergence)
@pytest.mark.parametrize("top_k", [None, 4, V - 1])
def test_what_a_teacher_rules_out_is_no_nan(
    divergence: Divergence, top_k: int | None, student: Tensor, teacher: Tensor
) -> None:
    teacher[:, 3] = -torch.inf
    teacher[0, 1:] = -torch.inf  # sure of one token
    rest = teacher[0].exp() > 0

    total, gradient = compared(student, teacher, divergence=divergence, top_k=top_k)
    alone, _ = compared(student[:1], teacher[:1], divergence=divergence, top_k=top_k)

    assert total.isfinite()
    assert gradient.isfinite().all()
    # Forward: −log of the student's probability; reverse: the student's over what is possible, which is 1.
    q = torch.softmax(student[0, :V].detach(), dim=-1)[rest]
    assert alone.item() == pytest.approx(-q.log().item() if divergence == "forward" else 0.0)


@pytest.mark.parametrize("divergence", Divergence)
@pytest.mark.parametrize("top_k", [None, 4])
def test_mask_which_neither_predicts_changes_nothing(
    divergence: Divergence, top_k: int | None, student: Tensor, teacher: Tensor
) -> None:
    others = [token for token in range(V) if token != 2]
    hidden, told = student.detach().clone(), teacher.clone()
    hidden[:, 2] = told[:, 2] = -torch.inf
    whole, slope = Comparison(
        wanted_by="logits_distill", divergence=divergence, top_k=top_k, confidence_k=CONFIDENCE
    ).token_loss(lambda tokens: teacher[:, others], V - 1)(
        student.detach()[:, others], slice(0, C), gradient=True
    )

    total, gradient = compared(hidden[:, :V], told, divergence=divergence, top_k=top_k)

    assert slope is not None
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(gradient[:, others], slope)
    assert not gradient[:, 2].any()


def test_a_token_that_the_student_cannot_say_is_left_out_of_a_top_k(student: Tensor, teacher: Tensor) -> None:
    """[MASK], from a teacher elsewhere who does not know that it is out of the question."""
    hidden = student.detach().clone()
    best = teacher.argmax(-1, keepdim=True)
    hidden[:, :V] = hidden[:, :V].scatter(1, best, -torch.inf)
    log_probs, ids = teacher.log_softmax(-1).topk(4)
    q, p = outcomes(hidden, teacher.scatter(1, best, -torch.inf), 1.0, 3)

    total, gradient = compared(hidden, TopK(ids, log_probs))

    torch.testing.assert_close(total, expected(q, p, "forward"))
    assert gradient.isfinite().all()
    assert not gradient.gather(1, best).any()


@pytest.mark.parametrize("divergence", Divergence)
@pytest.mark.parametrize("top_k", [None, 4])
def test_nothing_is_left_to_learn_from_oneself(
    divergence: Divergence, top_k: int | None, teacher: Tensor
) -> None:
    teacher[:, 3] = -torch.inf

    total, gradient = compared(teacher, teacher.clone(), divergence=divergence, top_k=top_k)

    torch.testing.assert_close(total.item(), 0.0)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("divergence", Divergence)
@pytest.mark.parametrize("top_k", [None, 4])
def test_numbers_that_are_none_are_seen(
    divergence: Divergence, top_k: int | None, student: Tensor, teacher: Tensor
) -> None:
    spoilt, told = student.detach().clone(), teacher.clone()
    spoilt[1, 2] = told[1, 2] = torch.nan

    assert compared(spoilt, teacher, divergence=divergence, top_k=top_k)[0].isnan()
    assert compared(student, told, divergence=divergence, top_k=top_k)[0].isnan()
