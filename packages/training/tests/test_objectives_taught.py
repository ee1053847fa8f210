"""What holds for every objective with a teacher; and distillation at masked tokens, position by position."""

from dataclasses import fields
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from bitnet_arch import BlockDiffusion, add_mask_token, set_block_diffusion
from bitnet_arch.testing import tiny_llama
from data_handler import Batch
from durable import UserError
from wrinklefree.objectives import (
    DiffusionConfig,
    Needs,
    ObjectiveManager,
    States,
    TCSDistillationObjective,
    ViewPlan,
    create_objective,
    create_objective_manager,
    decoder_states,
)
from wrinklefree.objectives.head import Head
from wrinklefree.objectives.states import DecoderStates
from wrinklefree.teachers.base import TopK
from wrinklefree.teachers.local import LocalTeacher

VOCAB_SIZE, LENGTH, BLOCK = 64, 12, 4
PLAN = ViewPlan(block_size=BLOCK, seed=5)
TAUGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "logits_distill": ("logits_distill", {"temperature": 2.0}),
    "logits_distill, top k": ("logits_distill", {"divergence": "adaptive", "top_k": 9}),
    "attention_distill": ("attention_distill", {}),
    "bitdistill": ("bitdistill", {}),
    "layerwise": ("layerwise", {"loss_type": "inner_product", "layer_weights": "progressive"}),
    "lrc_reconstruction": ("lrc_reconstruction", {}),
    "tcs_distill": ("tcs_distill", {"top_k": 9}),
}


@pytest.fixture
def batch() -> Batch:
    """Three samples: two documents, one document, a prompt with an answer."""
    input_ids = torch.randint(0, VOCAB_SIZE, (3, LENGTH), generator=torch.Generator().manual_seed(3))
    document_ids = torch.zeros_like(input_ids)
    document_ids[0, 5:] = 1
    position_ids = torch.arange(LENGTH) - 5 * document_ids
    labels = input_ids.masked_fill(position_ids == 0, -100)
    labels[2, :7] = -100
    return Batch(input_ids, labels, position_ids, document_ids, torch.zeros(3).long(), torch.arange(3))


def of_samples(batch: Batch, samples: slice | list[int]) -> Batch:
    return Batch(**{field.name: getattr(batch, field.name)[samples] for field in fields(Batch)})


def padded(batch: Batch, filler: int) -> Batch:
    """With another block of tokens that belong to nobody."""

    def longer(each: Tensor, last: Tensor) -> Tensor:
        return torch.cat([each, last.expand(len(each), BLOCK)], dim=1)

    return Batch(
        input_ids=longer(batch.input_ids, torch.tensor(filler)),
        labels=longer(batch.labels, torch.tensor(-100)),
        position_ids=longer(batch.position_ids, torch.arange(BLOCK)),
        document_ids=longer(batch.document_ids, torch.tensor(7)),
        source_id=batch.source_id,
        sample_id=batch.sample_id,
    )


def manager_of(taught: str) -> ObjectiveManager:
    name, options = TAUGHT[taught]
    return ObjectiveManager({name: create_objective(name, options, plan=PLAN)}, plan=PLAN)


def student_of(taught: str, seed: int = 0) -> Any:
    """With [MASK], where it is needed; the teacher never has one."""
    student: Any = tiny_llama(vocab_size=VOCAB_SIZE, seed=seed)
    if taught == "tcs_distill":
        mask = add_mask_token(student)
        set_block_diffusion(student, BlockDiffusion(mask_token_id=mask, block_size=BLOCK))
    return student


def a_teacher() -> LocalTeacher:
    return LocalTeacher(tiny_llama(vocab_size=VOCAB_SIZE, seed=1))


def taught_by(taught: str, *parts: Batch) -> tuple[float, int, dict[str, Tensor]]:
    """Of a step in these micro-batches: sum and count, and the gradient of the mean."""
    manager, student, teacher = manager_of(taught), student_of(taught), a_teacher()
    counts = [manager.counts(part) for part in parts]
    totals = {name: sum(count[name] for count in counts) for name in counts[0]}
    total = 0.0
    for part in parts:
        output = manager.step(student, teacher, part, totals)
        output.loss.backward()
        (loss,) = output.losses.values()
        total += loss.total.item()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return total, sum(totals.values()), gradients


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Within float32's precision at the size of each parameter's largest."""
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        largest = theirs[name].abs().max().item()
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=1e-5 * largest + 1e-9, msg=name)


@pytest.mark.parametrize("taught", TAUGHT)
def test_neither_the_cut_nor_padding_nor_doubling_changes_a_step(taught: str, batch: Batch) -> None:
    total, count, gradients = taught_by(taught, batch)

    others = {
        "cut": taught_by(taught, *(of_samples(batch, [sample]) for sample in range(3))),
        "padded": taught_by(taught, padded(batch, 3)),
        "padded otherwise": taught_by(taught, padded(batch, 60)),
    }
    twice = taught_by(taught, of_samples(batch, [0, 1, 2, 0, 1, 2]))

    assert total > 0
    for other_total, other_count, other_gradients in others.values():
        assert other_total == pytest.approx(total, rel=1e-5)
        assert other_count == count
        assert_same(other_gradients, gradients)
    assert twice[0] == pytest.approx(2 * total, rel=1e-5)
    assert twice[1] == 2 * count
    assert_same(twice[2], gradients)


@pytest.mark.parametrize("taught", TAUGHT)
def test_a_batch_without_labels_is_zero_with_a_graph(taught: str, batch: Batch) -> None:
    batch.labels.fill_(-100)
    manager = manager_of(taught)

    total, count, gradients = taught_by(taught, batch)
    losses = manager.losses(student_of(taught), a_teacher(), batch)

    assert (total, count) == (0, 0)
    assert gradients
    assert not any(gradient.any() for gradient in gradients.values())
    assert all(loss.total.requires_grad and loss.mean() == 0 for loss in losses.values())


@pytest.mark.parametrize("taught", [name for name in TAUGHT if name != "tcs_distill"])
def test_nothing_is_left_to_learn_from_oneself(taught: str, batch: Batch) -> None:
    manager, student = manager_of(taught), student_of(taught, seed=1)

    output = manager.step(student, a_teacher(), batch, manager.counts(batch))
    output.loss.backward()

    assert output.loss.item() == pytest.approx(0, abs=1e-6)
    found = [p.grad for p in student.parameters() if p.grad is not None]
    assert found
    # γ = 60 times what is left of float32 rows that are equal.
    assert all(gradient.abs().max() < 1e-4 for gradient in found)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("taught", [name for name in TAUGHT if name != "tcs_distill"])
def test_masked_views_beside_the_clean_tokens_change_nothing(taught: str, causal: bool, batch: Batch) -> None:
    plan = ViewPlan(block_size=BLOCK, seed=5, causal=causal)
    name, options = TAUGHT[taught]
    student, objective = student_of("tcs_distill"), create_objective(name, options)
    alone = ObjectiveManager({name: objective}).losses(student, a_teacher(), batch)
    both = {"dlm": create_objective("dlm", {}, plan=plan), name: objective}

    losses = ObjectiveManager(both, plan=plan).losses(student, a_teacher(), batch)

    torch.testing.assert_close(losses[name].total, alone[name].total, rtol=1e-5, atol=0)


@pytest.mark.parametrize("taught", TAUGHT)
def test_a_teacher_is_asked_for(taught: str, batch: Batch) -> None:
    manager = manager_of(taught)

    with pytest.raises(UserError, match=r"^objectives\.\w+: needs a teacher"):
        manager.step(student_of(taught), None, batch, manager.counts(batch))


@pytest.mark.parametrize(
    "taught", ["attention_distill", "bitdistill", "layerwise", "lrc_reconstruction", "tcs_distill"]
)
def test_logits_alone_are_refused_by_who_looks_inside(taught: str, batch: Batch) -> None:
    logits = {"logits": torch.zeros(3, LENGTH, VOCAB_SIZE)}

    with pytest.raises(UserError, match=r"^objectives\.\w+: cannot be computed from logits"):
        manager_of(taught)(logits, batch, logits)


def test_the_alias_of_earlier_documents_is_the_same_objective() -> None:
    manager = create_objective_manager({"layerwise_distill": {}})

    assert list(manager.objectives) == ["layerwise"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 5), (2.0, None)])
def test_masked_tokens_are_compared_one_before_in_view_and_clean_text(
    batch: Batch, temperature: float, top_k: int | None, causal: bool
) -> None:
    plan = ViewPlan(block_size=BLOCK, seed=5, causal=causal)
    student, teacher = student_of("tcs_distill"), a_teacher()
    views = plan.draw(batch)
    with torch.no_grad():
        seen = decoder_states(student, batch, views=views, plan=plan).logits.double()
    expected = torch.zeros((), dtype=torch.float64)
    for part, masked in enumerate(views.masked, start=1):
        for sample, place in masked.nonzero().tolist():
            begin = place - int(batch.position_ids[sample, place])
            clean = batch.input_ids[sample, begin:place]  # nothing of the masked token, or behind it
            told = teacher.model(input_ids=clean[None]).logits[0, -1].double()
            p = torch.softmax(told / temperature, dim=-1)
            q = torch.softmax(seen[sample, part * LENGTH + place - 1] / temperature, dim=-1)
            if top_k is not None:
                best = p.topk(top_k).indices
                p, q = (torch.cat([each[best], 1 - each[best].sum(0, keepdim=True)]) for each in (p, q))
            expected += temperature**2 * (p * (p / q).log()).sum()
    objective = TCSDistillationObjective(plan=plan, temperature=temperature, top_k=top_k)
    manager = ObjectiveManager({"tcs_distill": objective}, plan=plan)

    output = manager.step(student, teacher, batch, manager.counts(batch))

    loss = output.losses["tcs_distill"]
    assert loss.count == sum(int(masked.sum()) for masked in views.masked)
    torch.testing.assert_close(loss.total.double(), expected, rtol=1e-5, atol=0)


def test_a_view_that_says_what_the_teacher_says_one_before_has_nothing_to_learn(batch: Batch) -> None:
    told = torch.randn(3, LENGTH, VOCAB_SIZE)
    views = PLAN.draw(batch)
    objective = TCSDistillationObjective(plan=PLAN)

    def total(view: Tensor) -> float:
        parts = torch.cat([torch.zeros_like(told), view, view], dim=1)
        student = DecoderStates(parts, Head(nn.Identity()), num_parts=3)
        states = States(student=student, teacher=DecoderStates.from_logits(told), views=views)
        return objective(states, batch).total.item()

    assert total(told) == pytest.approx(0, abs=1e-5)
    assert total(told.roll(1, dims=1)) > 10
    assert total(told.roll(-1, dims=1)) > 10


def test_a_teacher_of_top_k_serves_masked_tokens_too(batch: Batch) -> None:
    told, seen = torch.randn(2, 3, LENGTH, VOCAB_SIZE, dtype=torch.float64).unbind()
    student = DecoderStates(torch.cat([seen, seen, seen], dim=1), Head(nn.Identity()), num_parts=3)

    class Sparse:
        """The top 7 of the same logits."""

        vocab_size = VOCAB_SIZE
        layers: tuple[Tensor, ...] = ()
        relations: ClassVar[dict[int, tuple[Tensor, Tensor, Tensor]]] = {}

        def next_tokens(self, before_N: Tensor) -> Any:
            log_probs, ids = told.flatten(0, 1)[before_N].log_softmax(-1).topk(7)
            return lambda tokens: TopK(ids[tokens], log_probs[tokens])

    totals = [
        TCSDistillationObjective(plan=PLAN, top_k=7)(
            States(student=student, teacher=teacher, views=PLAN.draw(batch)), batch
        ).total
        for teacher in (DecoderStates.from_logits(told), Sparse())
    ]

    torch.testing.assert_close(*totals)


@pytest.mark.parametrize(
    ("options", "key"),
    [({"temperature": 0}, "temperature"), ({"top_k": 0}, "top_k"), ({"top_k": True}, "top_k")],
)
def test_a_wrong_option_of_tcs_is_named(options: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=rf"^objectives\.tcs_distill\.{key}: ") as refused:
        create_objective("tcs_distill", options)

    assert refused.value.exit_code == 2


def test_masks_come_from_the_runs_plan() -> None:
    manager = create_objective_manager({"tcs_distill": {}}, diffusion=DiffusionConfig(block_size=8), seed=3)

    assert manager.needs() == Needs(teacher_logits=True, masked_views=True)
    assert manager.objectives["tcs_distill"].plan == manager.plan == ViewPlan(block_size=8, seed=3)  # type: ignore[attr-defined]
