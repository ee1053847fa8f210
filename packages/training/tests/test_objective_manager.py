"""One step's gradient does not depend on how it is cut; weights and names mean what they say."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_arch import convert_to_bitnet, set_quant_amount
from bitnet_arch.testing import tiny_llama, tiny_mistral
from data_handler import Batch
from durable import UserError
from wrinklefree.objectives import (
    ContinuePretrainConfig,
    ContinuePretrainObjective,
    LogitsDistillationObjective,
    LossSum,
    Needs,
    Objective,
    ObjectiveManager,
    States,
    create_objective_manager,
)
from wrinklefree.objectives.states import DecoderStates
from wrinklefree.teachers.local import LocalTeacher

NUM_SAMPLES, NUM_TOKENS, VOCAB_SIZE = 8, 21, 512
BOTH = {"continue_pretrain": {"weight": 0.5}, "logits_distill": {"weight": 2.0, "temperature": 2.0}}


class MeanSquare(Objective):
    """Of the last hidden states, at every token: something that is not about the vocabulary."""

    name = "mean_square"

    def count(self, batch: Batch) -> int:
        return batch.input_ids.numel()

    def __call__(self, states: States, batch: Batch) -> LossSum:
        return LossSum(states.student.hidden.square().mean(dim=-1).sum(), self.count(batch))


class Untouchable(Objective):
    """Fails when anybody asks it anything."""

    name = "untouchable"

    def needs(self) -> Needs:
        raise AssertionError

    def count(self, batch: Batch) -> int:
        raise AssertionError

    def __call__(self, states: States, batch: Batch) -> LossSum:
        raise AssertionError


@pytest.fixture
def batch() -> Batch:
    """Eight samples with very different numbers of labels, one of them with none."""
    generator = torch.Generator().manual_seed(4)
    input_ids = torch.randint(0, VOCAB_SIZE, (NUM_SAMPLES, NUM_TOKENS), generator=generator)
    places = torch.arange(NUM_TOKENS).expand_as(input_ids)
    first_wanted = torch.tensor([1, 20, 3, 99, 18, 7, 2, 15])
    return Batch(
        input_ids=input_ids,
        labels=input_ids.masked_fill(places < first_wanted[:, None], -100),
        position_ids=places,
        document_ids=torch.zeros_like(input_ids),
        source_id=torch.zeros(NUM_SAMPLES, dtype=torch.int64),
        sample_id=torch.arange(NUM_SAMPLES),
    )


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    fields = ("input_ids", "labels", "position_ids", "document_ids", "source_id", "sample_id")
    parts = zip(*(getattr(batch, name).split(size) for name in fields), strict=True)
    return [Batch(*part) for part in parts]


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Within 1e-6 of each parameter's largest."""
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=1e-6 * scale, msg=name)


def objectives() -> dict[str, Objective]:
    return {
        "continue_pretrain": ContinuePretrainObjective(),
        "logits_distill": LogitsDistillationObjective(temperature=2.0),
        "mean_square": MeanSquare(),
    }


WEIGHTS = {"continue_pretrain": 0.5, "logits_distill": 2.0, "mean_square": 0.25}


def step_gradients(batch: Batch, size: int) -> tuple[dict[str, Tensor], float]:
    """Of one optimizer step in micro-batches of `size`, at λ = 0, and the step's loss."""
    student, teacher = tiny_llama(), LocalTeacher(tiny_mistral(seed=1))
    convert_to_bitnet(student)
    set_quant_amount(student, 0.0)
    manager = ObjectiveManager(objectives(), WEIGHTS)
    parts = micro_batches(batch, size)
    counts = [manager.counts(part) for part in parts]
    totals = {name: sum(count[name] for count in counts) for name in counts[0]}
    loss = 0.0
    for part in parts:
        output = manager.step(student, teacher, part, totals)
        output.loss.backward()
        loss += output.loss.item()
    return gradients(student), loss


@pytest.mark.parametrize("size", [4, 2, 1])
def test_a_step_has_the_same_gradient_however_it_is_cut(batch: Batch, size: int) -> None:
    expected, expected_loss = step_gradients(batch, NUM_SAMPLES)

    found, loss = step_gradients(batch, size)

    assert_same_gradients(found, expected)
    assert loss == pytest.approx(expected_loss, rel=1e-6)


def test_the_loss_is_the_weighted_sum_of_means(batch: Batch) -> None:
    student, teacher = tiny_llama(), tiny_mistral(seed=1)
    wanted = batch.labels[:, 1:] != -100
    ours, theirs = (
        model(input_ids=batch.input_ids).logits[:, :-1][wanted].double() for model in (student, teacher)
    )
    entropy = F.cross_entropy(ours, batch.labels[:, 1:][wanted])
    log_p, log_q = torch.log_softmax(theirs / 2, dim=-1), torch.log_softmax(ours / 2, dim=-1)
    divergence = 4 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    square = student.model(input_ids=batch.input_ids).last_hidden_state.square().mean()
    expected = 0.5 * entropy + 2 * divergence + 0.25 * square
    manager = ObjectiveManager(objectives(), WEIGHTS)

    output = manager.step(student, LocalTeacher(teacher), batch, manager.counts(batch))

    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=0)
    assert output.ce_loss is not None
    assert output.perplexity is not None
    torch.testing.assert_close(output.ce_loss.double(), entropy, rtol=1e-6, atol=0)
    torch.testing.assert_close(output.perplexity.double(), entropy.exp(), rtol=1e-5, atol=0)
    assert {name: loss.count for name, loss in output.losses.items()} == {
        "continue_pretrain": int(wanted.sum()),
        "logits_distill": int(wanted.sum()),
        "mean_square": NUM_SAMPLES * NUM_TOKENS,
    }
    assert not any(loss.total.requires_grad for loss in output.losses.values())


def test_losses_one_by_one_combine_to_the_same_step(batch: Batch) -> None:
    manager, teacher = ObjectiveManager(objectives(), WEIGHTS), LocalTeacher(tiny_mistral(seed=1))
    student, totals = tiny_llama(), manager.counts(batch)
    together = manager.step(student, teacher, batch, totals)
    together.loss.backward()
    expected = gradients(student)

    losses = manager.losses(student, teacher, batch)
    loss = manager.combine(losses, totals)
    loss.backward()

    torch.testing.assert_close(loss, together.loss)
    assert_same_gradients(gradients(student), expected)
    for name, part in losses.items():
        torch.testing.assert_close(part.total.detach(), together.losses[name].total)


def test_a_step_without_any_label_has_zero_loss_and_zero_gradients(batch: Batch) -> None:
    manager, student = create_objective_manager(BOTH), tiny_llama()
    batch.labels.fill_(-100)

    output = manager.step(student, LocalTeacher(tiny_llama(seed=1)), batch, manager.counts(batch))
    output.loss.backward()

    assert output.loss.item() == 0
    assert len(gradients(student)) == len(list(student.parameters()))
    combined = manager.combine(
        manager.losses(student, LocalTeacher(tiny_llama(seed=1)), batch), manager.counts(batch)
    )
    assert combined.requires_grad
    assert combined.item() == 0


def test_an_objective_of_weight_zero_is_not_computed(batch: Batch) -> None:
    parts: dict[str, Objective] = {
        "continue_pretrain": ContinuePretrainObjective(),
        "untouchable": Untouchable(),
    }
    manager = ObjectiveManager(parts, {"untouchable": 0.0})

    output = manager.step(tiny_llama(), None, batch, manager.counts(batch))

    assert output.losses.keys() == manager.active.keys() == {"continue_pretrain"}
    assert manager.needs() == Needs()


def test_the_teacher_is_needed_as_long_as_its_weight_is_not_zero(batch: Batch) -> None:
    manager, student = create_objective_manager(BOTH), tiny_llama()
    assert manager.needs().teacher_logits
    with pytest.raises(UserError, match=r"^objectives\.logits_distill: needs a teacher"):
        manager.step(student, None, batch, manager.counts(batch))

    manager.set_weights({"logits_distill": 0})

    assert not manager.needs().teacher_logits
    assert manager.step(student, None, batch, manager.counts(batch)).loss > 0


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"continue_pretrain": -1}, r"^objectives\.continue_pretrain\.weight: .*found -1"),
        ({"continue_pretrain": float("nan")}, r"^objectives\.continue_pretrain\.weight: .*found nan"),
        ({"continue_pretrain": "1"}, r"^objectives\.continue_pretrain\.weight: "),
        ({"continue_pretrain": 0}, r"^objectives: all weights are 0.*continue_pretrain"),
        ({"continue_pretrian": 1}, r"did you mean 'continue_pretrain'"),
    ],
)
def test_a_wrong_weight_is_named_and_changes_nothing(weights: dict[str, Any], message: str) -> None:
    manager = ObjectiveManager({"continue_pretrain": ContinuePretrainObjective()}, {"continue_pretrain": 3})

    with pytest.raises(UserError, match=message) as refused:
        manager.set_weights(weights)

    assert refused.value.exit_code == 2
    assert manager.weights == {"continue_pretrain": 3}


@pytest.mark.parametrize("as_dictionary", [True, False])
def test_who_ran_the_model_already_gets_the_same_losses(batch: Batch, as_dictionary: bool) -> None:
    manager, student, teacher = create_objective_manager(BOTH), tiny_llama(), tiny_llama(seed=1)
    expected = manager.step(student, LocalTeacher(teacher), batch, manager.counts(batch))
    expected.loss.backward()
    expected_gradients = gradients(student)
    outputs, taught = student(input_ids=batch.input_ids), teacher(input_ids=batch.input_ids)
    if as_dictionary:
        outputs = {"logits": outputs.logits}
    given = {"input_ids": batch.input_ids, "labels": batch.labels} if as_dictionary else batch

    output = manager(outputs, manager.preprocess_batch(given), taught)
    output.loss.backward()

    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.perplexity, expected.perplexity)
    assert_same_gradients(gradients(student), expected_gradients)


def test_logits_and_labels_are_asked_for(batch: Batch) -> None:
    manager = create_objective_manager({"continue_pretrain": {}})

    with pytest.raises(UserError, match="no logits"):
        manager({}, batch)
    with pytest.raises(UserError, match="no labels"):
        manager({"logits": torch.zeros(1, 2, 3)}, {"input_ids": torch.zeros(1, 2)})


def test_a_hopeless_model_has_a_perplexity_that_can_be_written_down() -> None:
    manager = create_objective_manager({"continue_pretrain": {}})
    logits = torch.tensor([[[1000.0, 0.0], [0.0, 0.0]]])

    output = manager({"logits": logits}, {"labels": torch.tensor([[0, 1]])})

    assert output.ce_loss == 1000
    assert output.perplexity is not None
    assert output.perplexity.isfinite()


def test_smoothed_cross_entropy_is_no_perplexity(batch: Batch) -> None:
    manager = create_objective_manager({"continue_pretrain": {"label_smoothing": 0.1}})
    logits = torch.randn(NUM_SAMPLES, NUM_TOKENS, 600)
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), label_smoothing=0.1
    )

    output = manager({"logits": logits}, batch)

    torch.testing.assert_close(output.loss, expected)
    assert output.ce_loss is None
    assert output.perplexity is None


def test_nonfinite_logits_are_seen_in_the_loss(batch: Batch) -> None:
    manager = create_objective_manager(BOTH)
    logits = torch.randn(NUM_SAMPLES, NUM_TOKENS, 31, requires_grad=True)
    spoilt = logits.detach().clone()
    spoilt[0, 4, 5] = torch.nan
    batch.labels.clamp_(max=30)

    for student, teacher in ((spoilt, logits), (logits, spoilt)):
        output = manager({"logits": student}, batch, {"logits": teacher.detach()})
        assert output.loss.isnan()


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"logit_distill": {}}, "did you mean 'logits_distill'"),
        ({"continue_pretrain": {"label_smoothin": 0.1}}, "did you mean 'label_smoothing'"),
        ({"continue_pretrain": {"label_smoothing": 1.0}}, r"^objectives\.continue_pretrain\.label_smoothing"),
        ({"continue_pretrain": {"enabled": "no"}}, r"^objectives\.continue_pretrain\.enabled"),
        ({"logits_distill": {"enabled": False, "temperature": -1}, "continue_pretrain": {}}, "temperature"),
        ({"dlm": {"weight": -1}, "continue_pretrain": {}}, r"^objectives\.dlm\.weight"),
        ({"layerwise_distill": {"weight": 0}, "layerwise": {"weight": 0}}, "twice"),
        ({"continue_pretrain": {"weight": 0}}, "all weights are 0"),
        ({}, "all weights are 0"),
        ({"continue_pretrain": 1.0}, r"^objectives\.continue_pretrain: is no table"),
        ({"tcs_distill": {"top_n": 100}}, "did you mean 'top_k'"),
        ({"logits_distill": {"ignore_index": -100}}, "unknown key"),
    ],
)
def test_what_a_configuration_gets_wrong_is_one_line(specs: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        create_objective_manager(specs)

    assert refused.value.exit_code == 2


def test_all_eight_objectives_are_named_to_who_misspells_one() -> None:
    with pytest.raises(UserError) as refused:
        create_objective_manager({"unheard_of": {}})

    assert set(refused.value.choices) == {
        "continue_pretrain",
        "dlm",
        "layerwise",
        "logits_distill",
        "attention_distill",
        "bitdistill",
        "tcs_distill",
        "lrc_reconstruction",
    }


def test_what_is_switched_off_is_left_out() -> None:
    manager = create_objective_manager(
        {
            "continue_pretrain": {"weight": 1.5, "label_smoothing": 0.1},
            "logits_distill": {"enabled": False},
            "dlm": {"enabled": False, "weight": 0.5, "weighting": "llada"},
            "layerwise_distill": {"weight": 0},
        }
    )

    assert manager.weights == {"continue_pretrain": 1.5}
    objective = manager.objectives["continue_pretrain"]
    assert isinstance(objective, ContinuePretrainObjective)
    assert objective.label_smoothing == 0.1


def test_options_reach_the_objective() -> None:
    manager = create_objective_manager(
        {"logits_distill": {"temperature": 5.0, "scale_by_squared_temperature": False}}
    )

    objective = manager.objectives["logits_distill"]

    assert isinstance(objective, LogitsDistillationObjective)
    assert (objective.comparison.temperature, objective.comparison.scale) == (5.0, 1.0)
    assert ContinuePretrainConfig().weight == 1.0


def test_logits_may_be_given_instead_of_states() -> None:
    logits = torch.randn(2, 3, 5)

    states = DecoderStates.from_logits(logits)

    assert states.vocab_size == 5
    assert states.logits is logits
