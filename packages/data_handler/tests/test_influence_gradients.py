"""Per-example gradients against torch.func, which makes them one example at a time from the definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_handler.influence.config import InfluenceTarget
from data_handler.influence.gradients import GradientExtractor, choose_layers, take
from data_handler.influence.projection import make_projection
from data_handler.influence.truth import TinyDecoder, Tokens
from data_handler.influence.truth import next_token_loss as loss
from durable import UserError

# Shapes: 5 examples, 7 positions, vocabulary 11, width 6, inner width 13.
EXAMPLES, POSITIONS, VOCABULARY, WIDTH, INNER = 5, 7, 11, 6, 13


def decoder(*, tied: bool = False) -> TinyDecoder:
    torch.manual_seed(3)
    model = TinyDecoder(vocabulary=VOCABULARY, width=WIDTH, inner=INNER, tied=tied, dropout=0.5)
    return model.double()


def tokens(num: int = EXAMPLES) -> Tokens:
    return Tokens(torch.randint(0, VOCABULARY, (num, POSITIONS), generator=torch.Generator().manual_seed(1)))


def gradients_one_by_one(model: TinyDecoder, batch: Tokens, names: list[str]) -> list[Tensor]:
    """[B, R, C] for each weight in `names`, by torch.func.vmap over torch.func.grad."""
    model.eval()
    held = dict(model.named_parameters())

    def of_one(parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, {**held, **parameters}, (ids[None, :-1],))[0]
        return F.cross_entropy(logits, ids[1:])

    wanted = {name: held[name].detach() for name in names}
    each = torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0))(wanted, batch.input_ids)
    model.train()
    return [each[name] for name in names]


@pytest.mark.parametrize("tied", [False, True])
def test_whole_gradients_are_those_of_torch_func_and_tied_weights_count_once(tied: bool) -> None:
    model, batch = decoder(tied=tied), tokens()
    names = ["embed_tokens.weight", "up.weight", "down.weight"] + ([] if tied else ["lm_head.weight"])

    found = GradientExtractor(model, loss, projection_dim=None)(batch)

    expected = torch.cat([each.flatten(1) for each in gradients_one_by_one(model, batch, names)], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("keep", [4, 30, 60])
def test_projected_gradients_are_projections_of_whole_ones(keep: int) -> None:
    model, batch = decoder(), tokens()
    extractor = GradientExtractor(model, loss, layers=["up"], projection_dim=keep, seed=9)

    found = extractor(batch)

    (whole_BRC,) = gradients_one_by_one(model, batch, ["up.weight"])
    projection = make_projection((INNER, 2 * WIDTH), keep=keep, seed=9, name="up")
    rows = torch.eye(INNER) if projection.rows.matrix is None else projection.rows.matrix
    columns = torch.eye(2 * WIDTH) if projection.columns.matrix is None else projection.columns.matrix
    expected = (rows.double().T @ whole_BRC @ columns.double()).flatten(1)
    torch.testing.assert_close(found, expected)
    assert found.shape[1] <= keep


def test_a_projection_keeps_inner_products_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 20, 30, generator=generator)
    products = []
    for seed in range(600):
        projection = make_projection((20, 30), keep=64, seed=seed, name="w")
        first, second = (
            projection.columns.project(projection.rows.project(g.T).T) for g in (one, one + other)
        )
        products.append(float((first * second).sum()))

    mean = torch.tensor(products).mean()

    error = torch.tensor(products).std() / 600**0.5
    assert abs(mean - float((one * (one + other)).sum())) < 4 * error


def test_training_gradients_modes_and_random_state_are_left_alone() -> None:
    model, batch = decoder(), tokens()
    loss(model, batch).sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    state = torch.get_rng_state()

    GradientExtractor(model, loss)(batch)

    after = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert model.training
    assert model.dropout.training
    assert torch.equal(state, torch.get_rng_state())
    assert not model.up._forward_hooks


def test_running_out_of_memory_shrinks_the_chunk_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = decoder(), tokens(7)

    def hungry(model: nn.Module, batch: Tokens) -> Tensor:
        if batch.input_ids.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(model, batch)

    extractor = GradientExtractor(model, hungry, chunk=6)
    found = extractor(batch)

    torch.testing.assert_close(found, GradientExtractor(model, loss, chunk=7)(batch))
    assert extractor.chunk == 1 or extractor.chunk == 2
    assert "going on with 3" in caplog.text


def test_one_example_that_does_not_fit_is_a_line_a_user_can_act_on() -> None:
    def starved(model: nn.Module, batch: Tokens) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match=r"do not fit.*fewer layers"):
        GradientExtractor(decoder(), starved)(tokens())


def test_an_error_that_is_not_about_memory_travels() -> None:
    def wrong(model: nn.Module, batch: Tokens) -> Tensor:
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        GradientExtractor(decoder(), wrong)(tokens())


class Normed(nn.Linear):
    """Multiplies its weight by a normalised input, and may say so."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.normalize(input, dim=-1), self.weight)


class HonestNormed(Normed):
    def effective_input(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


def test_a_layer_is_asked_for_the_tensor_that_multiplies_its_weight() -> None:
    model, batch = decoder(), tokens()
    model.up = HonestNormed(2 * WIDTH, INNER, bias=False).double()

    found = GradientExtractor(model, loss, layers=["up"], projection_dim=None)(batch)

    torch.testing.assert_close(found, gradients_one_by_one(model, batch, ["up.weight"])[0].flatten(1))


def test_a_layer_that_does_something_else_is_named() -> None:
    model = decoder()
    model.up = Normed(2 * WIDTH, INNER, bias=False).double()

    with pytest.raises(ValueError, match="gradients of up do not add up"):
        GradientExtractor(model, loss)(tokens())


def test_frozen_layers_and_padding_have_the_gradient_that_autograd_would_give() -> None:
    model, batch = decoder(), tokens()
    names = ["embed_tokens.weight", "up.weight"]
    expected = gradients_one_by_one(model, batch, names)
    expected[0][:, 4] = 0
    model.embed_tokens.padding_idx = 4
    model.requires_grad_(False)

    found = GradientExtractor(model, loss, layers=["embed_tokens", "up"], projection_dim=None)(batch)

    torch.testing.assert_close(found, torch.cat([each.flatten(1) for each in expected], dim=1))


def test_layers_are_chosen_by_kind_or_by_name() -> None:
    model = decoder()

    chosen = {target: list(choose_layers(model, target)) for target in InfluenceTarget}

    assert chosen[InfluenceTarget.EMBEDDING] == ["embed_tokens"]
    assert chosen[InfluenceTarget.OUTPUT] == ["lm_head"]
    assert chosen[InfluenceTarget.EMBEDDING_AND_OUTPUT] == ["embed_tokens", "lm_head"]
    assert chosen[InfluenceTarget.HIDDEN] == ["up", "down"]
    assert chosen[InfluenceTarget.ALL] == ["embed_tokens", "up", "down", "lm_head"]
    with pytest.raises(UserError, match="did you mean 'down'"):
        choose_layers(model, ["dwn"])


def test_examples_are_taken_from_every_field() -> None:
    batch = tokens()

    kept = take(batch, torch.tensor([True, False, True, False, False]))

    assert torch.equal(kept.input_ids, batch.input_ids[[0, 2]])
