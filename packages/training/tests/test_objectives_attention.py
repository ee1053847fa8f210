"""Relations among queries, keys and values are those of the paper's formula, between tokens that may meet."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet_arch import walk
from bitnet_arch.testing import tiny_gemma3, tiny_llama, tiny_mistral, tiny_qwen3
from data_handler import Batch
from durable import UserError
from wrinklefree.objectives import (
    AttentionRelationDistillationObjective,
    BitDistillObjective,
    ContinuePretrainObjective,
    LogitsDistillationObjective,
    Needs,
    ObjectiveManager,
    States,
    create_objective,
    relations,
)
from wrinklefree.objectives.relations import Normalization, relation_divergence
from wrinklefree.objectives.states import decoder_states
from wrinklefree.teachers.local import LocalTeacher
from wrinklefree.training.live_tensors import LiveTensors

B, T, GROUPS = 2, 7, 6
STUDENT, TEACHER = (3, 4), (2, 9)
"""Heads and the size of each."""
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]])
WANTED = torch.tensor([[1, 1, 0, 1, 1, 1, 0], [0, 0, 1, 1, 0, 1, 0]]).bool()


@pytest.fixture
def heads() -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    student, teacher = (torch.randn(B, h, T, d, dtype=torch.float64) for h, d in (STUDENT, TEACHER))
    return student.requires_grad_(), teacher


def relation(
    heads: Tensor, row: int, group: int, query: int, normalization: str, temperature: float
) -> Tensor:
    """One row of R: over the tokens of the same document up to the query itself."""
    channels = heads[row].transpose(0, 1).reshape(T, -1)
    size = channels.shape[1] // GROUPS
    rows = channels[:, group * size : (group + 1) * size]
    if normalization != "paper":
        rows = rows / (rows**2).sum(1, keepdim=True).sqrt()
    scale = temperature * (math.sqrt(size) if normalization == "paper" else 1)
    seen = [key for key in range(query + 1) if DOCUMENTS[row, key] == DOCUMENTS[row, query]]
    return torch.softmax(torch.stack([rows[query] @ rows[key] / scale for key in seen]), dim=0)


@pytest.mark.parametrize("rows_at_a_time", [2, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("normalization", Normalization)
def test_the_sum_is_that_of_the_formula(
    normalization: Normalization,
    temperature: float,
    rows_at_a_time: int,
    heads: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher = heads
    monkeypatch.setitem(relations.PART_ELEMENTS, "cpu", rows_at_a_time * GROUPS * T)
    expected = torch.zeros((), dtype=torch.float64)
    for row, group, query in ((b, g, t) for b in range(B) for g in range(GROUPS) for t in range(T)):
        if WANTED[row, query]:
            p, q = (
                relation(each, row, group, query, normalization, temperature) for each in (teacher, student)
            )
            expected = expected + (p * (p / q).log()).sum() / GROUPS
    if normalization == "code":
        expected = expected / GROUPS
    (slope,) = torch.autograd.grad(expected, student)

    total = relation_divergence(
        student,
        teacher,
        DOCUMENTS,
        WANTED,
        num_groups=GROUPS,
        normalization=normalization,
        temperature=temperature,
    )

    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.autograd.grad(total, student)[0], slope)


def test_a_relation_of_unit_vectors_is_known() -> None:
    """Rows of I: the last of four sees itself with 1 / √4 = ½ and three others with 0, so e^½ / (e^½ + 3)."""
    identity = torch.eye(4).view(1, 1, 4, 4)
    everywhere = torch.zeros(1, 1, 4, 4)
    documents = torch.zeros(1, 4, dtype=torch.int64)
    last = torch.tensor([[False, False, False, True]])
    p = torch.tensor([0.2151, 0.2151, 0.2151, 0.3547])

    options = {"num_groups": 1, "normalization": Normalization.paper, "temperature": 1.0}
    total = relation_divergence(everywhere, identity, documents, last, **options)  # type: ignore[arg-type]

    assert total.item() == pytest.approx((p * (p / 0.25).log()).sum().item(), abs=2e-4)


def test_with_unit_vectors_the_length_of_a_query_does_not_matter(heads: tuple[Tensor, Tensor]) -> None:
    student, teacher = heads
    factors = torch.tensor([0.3, 2.0, 11.0], dtype=torch.float64)[:, None, None]

    def total(student: Tensor, normalization: Normalization) -> Tensor:
        options = {"num_groups": 3, "normalization": normalization, "temperature": 1.0}
        return relation_divergence(student, teacher, DOCUMENTS, WANTED, **options)  # type: ignore[arg-type]

    same = Normalization.cosine
    torch.testing.assert_close(total(student * factors, same), total(student, same))
    assert total(student * factors, Normalization.paper) > 1.1 * total(student, Normalization.paper)


def test_no_more_than_a_part_of_all_pairs_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    length, groups, part = 256, 8, 2**14
    monkeypatch.setitem(relations.PART_ELEMENTS, "cpu", part)
    student, teacher = torch.randn(2, 1, groups, length, 4).unbind()
    student.requires_grad_()
    documents, wanted = torch.zeros(1, length).long(), torch.ones(1, length).bool()
    options: dict[str, Any] = {
        "num_groups": groups,
        "normalization": Normalization.cosine,
        "temperature": 1.0,
    }

    with LiveTensors() as counter:
        relation_divergence(student, teacher, documents, wanted, **options).backward()

    # Of each part some ten tensors, forward and backward; all pairs would be 32 parts.
    assert counter.peak < 16 * part * 4 < groups * length**2 * 4


@pytest.fixture
def batch() -> Batch:
    """Two samples, the first of two documents and with padding, the second with a prompt."""
    input_ids = torch.randint(0, 512, (2, 12), generator=torch.Generator().manual_seed(3))
    labels = input_ids.clone()
    document_ids = torch.zeros_like(input_ids)
    document_ids[0, 5:] = 1
    labels[0, [0, 5]] = labels[1, 0] = -100
    labels[0, 10:] = labels[1, 1:6] = -100
    starts = document_ids * 5
    position_ids = torch.arange(12) - starts
    return Batch(input_ids, labels, position_ids, document_ids, torch.zeros(2).long(), torch.arange(2))


def states_of(student: Any, teacher: Any, batch: Batch, needs: Needs) -> States:
    return States(
        student=decoder_states(student, batch, hidden_states=needs.hidden_states, relations=needs.relations),
        teacher=LocalTeacher(teacher).states(batch, needs),
    )


@pytest.mark.parametrize("student", [tiny_llama, tiny_qwen3, tiny_gemma3])
def test_queries_and_keys_are_taken_as_they_go_into_attention(student: Any, batch: Batch) -> None:
    """Scores of transformers' eager attention come back from what was taken, so the rotation is in it."""
    model, eager = student(), student()
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        seen = decoder_states(model, batch, relations={-1}).relations[-1]
        alone = {name: getattr(batch, name)[1:] for name in ("input_ids", "position_ids")}
        attention = eager(**alone, output_attentions=True).attentions[-1][0]
    queries, keys = seen[0][1], seen[1][1]
    keys = keys.repeat_interleave(queries.shape[0] // keys.shape[0], dim=0)
    last = eager.model.layers[-1].self_attn
    scores = queries @ keys.transpose(-1, -2) * last.scaling
    scores = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)

    torch.testing.assert_close(scores.softmax(-1), attention, rtol=1e-4, atol=1e-5)


def test_rows_count_where_the_next_token_has_a_label(batch: Batch) -> None:
    objective = AttentionRelationDistillationObjective(split_heads=4)
    student, teacher = tiny_llama(), tiny_qwen3(seed=1)
    states = states_of(student, teacher, batch, objective.needs())

    loss = objective(states, batch)
    loss.total.backward()

    assert loss.count == objective.count(batch) == 4 + 4 + 6
    assert states.teacher is not None
    wanted = torch.cat([batch.labels[:, 1:] != -100, torch.zeros(2, 1).bool()], dim=1)
    options: dict[str, Any] = {
        "num_groups": 4,
        "normalization": Normalization.cosine,
        "temperature": 1.0,
    }
    parts = [
        relation_divergence(ours.detach(), theirs, batch.document_ids, wanted, **options)
        for ours, theirs in zip(states.student.relations[-1], states.teacher.relations[-1], strict=True)
    ]
    expected = torch.stack(parts).sum()
    torch.testing.assert_close(loss.total.detach(), expected)
    # What is behind the last layer's projections has no part in it.
    assert student.model.layers[-1].self_attn.v_proj.weight.grad.any()
    assert student.model.layers[-1].mlp.up_proj.weight.grad is None


def test_two_numbers_may_mean_one_layer(batch: Batch) -> None:
    found = decoder_states(tiny_llama(), batch, relations={-1, 1}).relations

    assert found.keys() == {-1, 1}
    assert all(torch.equal(one, other) for one, other in zip(found[-1], found[1], strict=True))


@pytest.mark.parametrize("name", ["attention_distill", "bitdistill"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"split_heads: .*different numbers of heads .*found 4 and 6\)"),
        ({"split_heads": 5}, r"split_heads: does not divide the student's channels .*found 5, 64 channels"),
        ({"split_heads": 32}, r"split_heads: does not divide the teacher's channels .*found 32, 48 channels"),
        ({"distill_layer": 2}, r"distill_layer: there is no such layer .*found 2, the model has 2"),
    ],
)
def test_two_models_that_do_not_fit_are_refused_with_both_numbers(
    name: str, options: dict[str, Any], message: str
) -> None:
    manager = ObjectiveManager({name: create_objective(name, options)})

    with pytest.raises(UserError, match=rf"^objectives\.{name}\.{message}") as refused:
        manager.check_models(tiny_llama(), tiny_mistral())

    assert refused.value.exit_code == 2


def test_a_teacher_with_other_heads_fits_where_both_can_be_split() -> None:
    student, teacher = walk(tiny_llama()), walk(tiny_mistral())

    objective = create_objective("attention_distill", {"split_heads": 8, "distill_layer": -2})

    objective.check_models(student, teacher)

    assert (student.num_heads, teacher.num_heads) == (4, 6)


def wide_llama(**options: Any) -> Any:
    """Of 64 channels each, so that 32 groups are of two, not of one, whose direction is its sign."""
    return tiny_llama(num_key_value_heads=4, **options)


@pytest.mark.parametrize(
    ("options", "logits", "attention", "gamma"),
    [
        (
            {"gamma_attention": 60.0},
            {"temperature": 5.0, "scale_by_squared_temperature": False},
            {"normalization": "cosine"},
            60.0,
        ),
        (
            {"preset": "code"},
            {"temperature": 5.0},
            {"normalization": "code", "split_heads": 32},
            1e5,
        ),
        (
            {"preset": "paper", "lambda_logits": 2.0, "distill_layer": 0},
            {"temperature": 5.0, "scale_by_squared_temperature": False},
            {"normalization": "paper", "distill_layer": 0},
            1e5,
        ),
    ],
)
def test_bitdistill_is_the_weighted_sum_of_both(
    options: dict[str, Any], logits: dict[str, Any], attention: dict[str, Any], gamma: float, batch: Batch
) -> None:
    student, teacher = wide_llama(), wide_llama(seed=1)
    weight = options.get("lambda_logits", 10.0)
    parts = LogitsDistillationObjective(**logits), AttentionRelationDistillationObjective(**attention)
    objective = BitDistillObjective(**options)
    needs = parts[0].needs() | parts[1].needs()
    ld, ad = (part(states_of(student, teacher, batch, needs), batch).mean() for part in parts)
    (weight * ld + gamma * ad).backward()
    expected = {name: p.grad for name, p in student.named_parameters()}
    again = wide_llama()

    loss = objective(states_of(again, teacher, batch, objective.needs()), batch)
    loss.mean().backward()

    assert objective.needs() == needs
    assert loss.count == objective.count(batch) == parts[1].count(batch)
    torch.testing.assert_close(loss.mean(), weight * ld + gamma * ad)
    for name, parameter in again.named_parameters():
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-5 * largest)


def test_bitdistill_shares_the_pass_over_the_head(batch: Batch) -> None:
    """Beside cross entropy the manager gives the same numbers as each alone."""
    student, teacher = tiny_llama(), LocalTeacher(tiny_llama(seed=1))
    parts = {"continue_pretrain": ContinuePretrainObjective(), "bitdistill": BitDistillObjective()}
    manager = ObjectiveManager(parts, {"bitdistill": 0.5})
    counts = manager.counts(batch)
    alone = manager.losses(student, teacher, batch)

    output = manager.step(student, teacher, batch, counts)

    torch.testing.assert_close(output.loss, manager.combine(alone, counts))
    for name, loss in output.losses.items():
        torch.testing.assert_close(loss.total, alone[name].total.detach())


def test_without_gamma_no_relations_are_taken() -> None:
    assert BitDistillObjective(gamma_attention=0).needs() == Needs(teacher_logits=True)


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("attention_distill", {"distill_layer": 0.5}, "distill_layer"),
        ("attention_distill", {"normalization": "l2"}, "normalization"),
        ("attention_distill", {"split_heads": 0}, "split_heads"),
        ("attention_distill", {"temperature": 0}, "temperature"),
        ("bitdistill", {"preset": "classification"}, "preset"),
        ("bitdistill", {"lambda_logits": 0}, "lambda_logits"),
        ("bitdistill", {"gamma_attention": -1}, "gamma_attention"),
        ("bitdistill", {"temperature": -1}, "temperature"),
        ("bitdistill", {"scale_by_squared_temperature": 1}, "scale_by_squared_temperature"),
        ("bitdistill", {"normalization": "l2"}, "normalization"),
    ],
)
def test_a_wrong_option_is_named(name: str, options: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=rf"^objectives\.{name}\.{key}: ") as refused:
        create_objective(name, options)

    assert refused.value.exit_code == 2
