"""Distillation compares the right positions and vocabularies, and leaves the teacher alone."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_arch.testing import tiny_gemma3, tiny_llama, tiny_mistral
from data_handler import Batch
from durable import UserError
from wrinklefree.objectives import (
    LogitsDistillationObjective,
    LogitsDistillConfig,
    Needs,
    ObjectiveManager,
    States,
    decoder_states,
)
from wrinklefree.teachers.local import LocalTeacher

VOCAB_SIZE = 512


@pytest.fixture
def batch() -> Batch:
    """Two samples of two documents each, with labels missing in the middle of one."""
    input_ids = torch.randint(0, VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(3))
    document_ids = torch.zeros_like(input_ids)
    document_ids[0, 25:], document_ids[1, 11:] = 1, 1
    starts = torch.tensor([25, 11])
    places = torch.arange(40).expand(2, 40)
    position_ids = places - document_ids * starts[:, None]
    labels = input_ids.masked_fill(position_ids == 0, -100)
    labels[1, 20:31] = -100
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        document_ids=document_ids,
        source_id=torch.zeros(2, dtype=torch.int64),
        sample_id=torch.arange(2),
    )


def distilled(student: Any, teacher: Any, batch: Batch, **options: Any) -> Tensor:
    """The mean loss."""
    objective = LogitsDistillationObjective(**options)
    states = States(
        student=decoder_states(student, batch),
        teacher=LocalTeacher(teacher).states(batch, Needs(teacher_logits=True)),
    )
    loss = objective(states, batch)
    assert loss.count == objective.count(batch)
    return loss.mean()


def logits_by_document(model: Any, batch: Batch) -> Tensor:
    """[N, V]: of transformers, one document at a time, where the next token has a label."""
    rows = []
    for sample in range(2):
        for document in range(2):
            inside = batch.document_ids[sample] == document
            logits = model(input_ids=batch.input_ids[sample][inside][None]).logits[0, :-1]
            rows.append(logits[batch.labels[sample][inside][1:] != -100])
    return torch.cat(rows).double()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_teacher_and_student_are_compared_where_the_next_token_has_a_label(
    batch: Batch, temperature: float
) -> None:
    student, teacher = tiny_llama(), tiny_gemma3(seed=1)
    ours, theirs = (logits_by_document(model, batch) / temperature for model in (student, teacher))
    p, q = torch.softmax(theirs, dim=-1), torch.softmax(ours, dim=-1)
    expected = temperature**2 * (p * (p / q).log()).sum(dim=-1).mean()

    loss = distilled(student, teacher, batch, temperature=temperature)

    assert student.config.hidden_size != teacher.config.hidden_size
    # One float32 step of a log-probability around 6, twice.
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=1e-6 * temperature**2)


def test_the_squared_temperature_keeps_the_size_of_the_gradient(batch: Batch) -> None:
    norms = {}
    for scaled in (True, False):
        for temperature in (20.0, 40.0):
            student = tiny_llama()
            options = {"temperature": temperature, "scale_by_squared_temperature": scaled}
            distilled(student, tiny_llama(seed=1), batch, **options).backward()
            norms[scaled, temperature] = torch.nn.utils.get_total_norm(
                [p.grad for p in student.parameters() if p.grad is not None]
            ).item()

    # At high temperature the divergence is quadratic in the logits over τ, and so falls as 1 / τ².
    assert norms[True, 40.0] / norms[True, 20.0] == pytest.approx(1, rel=0.02)
    assert norms[False, 40.0] / norms[False, 20.0] == pytest.approx(1 / 4, rel=0.02)


def test_nothing_is_left_to_learn_from_oneself(batch: Batch) -> None:
    student = tiny_llama()

    loss = distilled(student, tiny_llama(), batch, temperature=2.0)
    loss.backward()

    assert loss.item() == 0
    for parameter in student.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_a_student_with_extra_tokens_is_compared_over_the_teachers_vocabulary(batch: Batch) -> None:
    student, teacher = tiny_mistral(vocab_size=VOCAB_SIZE + 3), tiny_mistral(vocab_size=VOCAB_SIZE, seed=1)
    ours, theirs = logits_by_document(student, batch)[:, :VOCAB_SIZE], logits_by_document(teacher, batch)
    expected = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")

    loss = distilled(student, teacher, batch)
    loss.backward()

    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=1e-6)
    assert student.lm_head.weight.grad is not None
    assert not student.lm_head.weight.grad[VOCAB_SIZE:].any()


def test_a_student_with_fewer_tokens_than_the_teacher_is_refused_with_both_sizes(batch: Batch) -> None:
    with pytest.raises(UserError, match=r"519 and 512") as refused:
        distilled(tiny_llama(), tiny_llama(vocab_size=519), batch)

    assert refused.value.exit_code == 4


def test_the_teacher_is_only_asked(batch: Batch) -> None:
    model = tiny_llama(attention_dropout=0.5).train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    manager = ObjectiveManager({"logits_distill": LogitsDistillationObjective()})
    teacher, student = LocalTeacher(model), tiny_llama(seed=1)
    random_state = torch.get_rng_state()

    first = manager.step(student, teacher, batch, manager.counts(batch)).loss
    second = manager.step(student, teacher, batch, manager.counts(batch)).loss
    first.backward()

    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    torch.testing.assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)


def test_a_teacher_may_be_kept_in_half_the_memory(batch: Batch) -> None:
    student = tiny_llama(seed=1)
    exact = distilled(student, tiny_llama(), batch)
    teacher = LocalTeacher(tiny_llama(), dtype=torch.bfloat16)

    states = States(
        student=decoder_states(student, batch), teacher=teacher.states(batch, Needs(teacher_logits=True))
    )
    loss = LogitsDistillationObjective()(states, batch).mean()

    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}
    assert loss.dtype == torch.float32
    # Eight bits of mantissa in the teacher's logits.
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0)


def test_closing_frees_the_weights() -> None:
    model = tiny_llama()
    alive = weakref.ref(model.model.embed_tokens.weight)
    teacher = LocalTeacher(model)
    del model

    teacher.close()
    gc.collect()

    assert alive() is None


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"scale_by_squared_temperature": 1}, "scale_by_squared_temperature"),
        ({"weight": -1.0}, "weight"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=rf"^objectives\.logits_distill\.{key}: ") as refused:
        LogitsDistillConfig(**options)

    assert refused.value.exit_code == 2
