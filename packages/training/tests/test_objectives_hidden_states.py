"""Hidden states are compared layer by layer where a token is learned from, as the formulas say."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitnet_arch import walk
from bitnet_arch.testing import tiny_llama, tiny_mistral
from data_handler import Batch
from durable import UserError
from wrinklefree.objectives import (
    LayerwiseDistillationObjective,
    LRCReconstructionObjective,
    Needs,
    Objective,
    ObjectiveManager,
    States,
    create_objective,
)
from wrinklefree.objectives.head import Head
from wrinklefree.objectives.states import DecoderStates, decoder_states
from wrinklefree.teachers.local import LocalTeacher

B, T, D, NUM_LAYERS = 2, 5, 3, 4
KINDS = [
    ("layerwise", "mse"),
    ("layerwise", "mse_normalized"),
    ("layerwise", "inner_product"),
    ("lrc_reconstruction", "mse"),
    ("lrc_reconstruction", "mse_normalized"),
    ("lrc_reconstruction", "cosine"),
]


def states_of(layers: list[Tensor]) -> DecoderStates:
    return DecoderStates(layers[-1], Head(nn.Identity()), layers=tuple(layers))


def batch_of(labels: Tensor) -> Batch:
    places = torch.arange(labels.shape[1]).expand_as(labels)
    zeros = torch.zeros_like(labels)
    return Batch(zeros, labels, places, zeros, zeros[:, 0], torch.arange(len(labels)))


@pytest.fixture
def batch() -> Batch:
    """A whole text, and a prompt of three tokens with an answer of one, then padding."""
    return batch_of(torch.tensor([[-100, 5, 6, 7, 8], [-100, -100, -100, 9, -100]]))


COUNTS = [[1, 1, 1, 1, 1], [0, 0, 1, 1, 0]]


@pytest.fixture
def layers() -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(3)
    ours, theirs = torch.randn(2, NUM_LAYERS, B, T, D, dtype=torch.float64).unbind()
    return [layer.clone().requires_grad_() for layer in ours], list(theirs)


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum()


def formula(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Of one token, with loops and no normalisation by torch."""
    if kind == "mse":
        return sum_of((student[d] - teacher[d]) ** 2 for d in range(D)) / D
    cosine = (student * teacher).sum() / (student**2).sum().sqrt() / (teacher**2).sum().sqrt()
    return 2 * (1 - cosine) / D if kind == "mse_normalized" else 1 - cosine


@pytest.mark.parametrize(("name", "kind"), KINDS)
@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        (None, [0.25, 0.25, 0.25, 0.25]),
        ("progressive", [0.1, 0.2, 0.3, 0.4]),
        ("exponential", [1 / 15, 2 / 15, 4 / 15, 8 / 15]),
        ([0, 3, 0, 1], [0, 0.75, 0, 0.25]),
    ],
)
def test_the_sum_is_that_of_the_formula(
    name: str, kind: str, weights: Any, shares: list[float], batch: Batch, layers: Any
) -> None:
    ours, theirs = layers
    expected = sum_of(
        share * formula(kind, ours[layer][row, place], theirs[layer][row, place])
        for layer, share in enumerate(shares)
        for row in range(B)
        for place in range(T)
        if COUNTS[row][place]
    )
    slopes = torch.autograd.grad(expected, ours, materialize_grads=True)
    objective = create_objective(name, {"loss_type": kind, "layer_weights": weights})

    loss = objective(States(student=states_of(ours), teacher=states_of(theirs)), batch)

    assert loss.count == objective.count(batch) == 7
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(torch.autograd.grad(loss.total, ours, materialize_grads=True), slopes)


def test_values_that_are_known() -> None:
    """A difference of 0.1 everywhere; right angles; opposite directions."""
    batch = batch_of(torch.tensor([[-100, 1]]))

    def mean(name: str, kind: str, student: list[float], teacher: list[float]) -> float:
        ours, theirs = (states_of([torch.tensor([[each, each]])]) for each in (student, teacher))
        objective = create_objective(name, {"loss_type": kind})
        return objective(States(student=ours, teacher=theirs), batch).mean().item()

    assert mean("lrc_reconstruction", "mse", [1.0, 2.0], [1.1, 1.9]) == pytest.approx(0.01)
    assert mean("layerwise", "mse_normalized", [3.0, 0.0], [0.0, 7.0]) == pytest.approx(1.0)
    assert mean("lrc_reconstruction", "cosine", [3.0, 0.0], [0.0, 7.0]) == pytest.approx(1.0)
    assert mean("lrc_reconstruction", "cosine", [1.0, 2.0], [2.0, 4.0]) == pytest.approx(0, abs=1e-7)
    assert mean("layerwise", "inner_product", [1.0, 2.0], [-2.0, -4.0]) == pytest.approx(2.0)


def test_a_map_says_which_layers_of_a_deeper_teacher_are_meant(batch: Batch, layers: Any) -> None:
    ours, theirs = layers
    student = states_of(ours[:2])
    expected = create_objective("layerwise", {"loss_type": "mse"})(
        States(student=student, teacher=states_of([theirs[1], theirs[3]])), batch
    )

    objective = LayerwiseDistillationObjective(loss_type="mse", teacher_layers=[1, -1])
    loss = objective(States(student=student, teacher=states_of(theirs)), batch)

    torch.testing.assert_close(loss.total, expected.total, rtol=0, atol=0)


def test_layers_are_what_each_gives_to_the_next_before_the_final_norm(batch: Batch) -> None:
    student, teacher = tiny_llama(), tiny_llama(seed=1)
    batch = batch_of(torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(0)))
    states = []
    for model in (student, teacher):
        hidden = model.model(input_ids=batch.input_ids, output_hidden_states=True).hidden_states
        # transformers' own last one is after the norm.
        before_norm: list[Tensor] = []
        handle = model.model.norm.register_forward_pre_hook(
            lambda module, inputs, kept=before_norm: kept.append(inputs[0])
        )
        model.model(input_ids=batch.input_ids)
        handle.remove()
        states.append([*hidden[1:-1], *before_norm])
    expected = sum((ours - theirs).square().mean(-1).sum() / 2 for ours, theirs in zip(*states, strict=True))
    objective = LRCReconstructionObjective()

    loss = objective(
        States(
            student=decoder_states(student, batch, hidden_states=True),
            teacher=LocalTeacher(teacher).states(batch, objective.needs()),
        ),
        batch,
    )

    assert objective.needs() == Needs(hidden_states=True)
    assert objective.needs().needs_inside
    torch.testing.assert_close(loss.total, expected)


@pytest.mark.parametrize("name", ["layerwise", "lrc_reconstruction"])
@pytest.mark.parametrize(
    ("options", "teacher", "message"),
    [
        ({}, tiny_mistral, r"teacher_layers: .*found 2 and 3"),
        ({"teacher_layers": [0, 2]}, tiny_mistral, r": .*different hidden sizes .*found 64 and 48"),
        ({"teacher_layers": [0]}, tiny_mistral, r"teacher_layers: .*found 1, the student has 2"),
        ({"teacher_layers": [0, 3]}, tiny_mistral, r"teacher_layers: .*found 3, the model has 3"),
        ({"layer_weights": [1, 2, 3]}, tiny_llama, r"layer_weights: .*found 3 weights, the student has 2"),
    ],
)
def test_two_models_that_do_not_fit_are_refused_with_both_numbers(
    name: str, options: dict[str, Any], teacher: Any, message: str
) -> None:
    objective: Objective = create_objective(name, options)
    student, other = tiny_llama(), teacher()
    batch = batch_of(torch.tensor([[-100, 5, 6]]))
    states = States(
        student=decoder_states(student, batch, hidden_states=True),
        teacher=decoder_states(other, batch, hidden_states=True),
    )

    for refuse in (
        lambda: objective.check_models(walk(student), walk(other)),
        lambda: ObjectiveManager({name: objective}).check_models(student, other),
        lambda: objective(states, batch),
    ):
        with pytest.raises(UserError, match=rf"^objectives\.{name}\.?{message}") as refused:
            refuse()
        assert refused.value.exit_code == 2


@pytest.mark.parametrize("name", ["layerwise", "lrc_reconstruction"])
@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"loss_type": "kl"}, "loss_type"),
        ({"layer_weights": "linear"}, "layer_weights"),
        ({"layer_weights": [0, 0]}, "layer_weights"),
        ({"layer_weights": [1, -1]}, "layer_weights"),
        ({"layer_weights": 3}, "layer_weights"),
        ({"teacher_layers": "all"}, "teacher_layers"),
        ({"teacher_layers": [0.5]}, "teacher_layers"),
    ],
)
def test_a_wrong_option_is_named(name: str, options: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=rf"^objectives\.{name}\.{key}: ") as refused:
        create_objective(name, options)

    assert refused.value.exit_code == 2
