"""Masked views beside the clean tokens: who looks at whom, what is masked, and what their loss is."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitnet_arch import (
    BlockDiffusion,
    add_mask_token,
    convert_to_bitnet,
    set_block_diffusion,
    set_quant_amount,
)
from bitnet_arch.testing import tiny_gemma3, tiny_llama, tiny_qwen3
from bitnet_arch.walk import config_of
from data_handler import Batch
from durable import UserError
from wrinklefree.objectives import (
    ContinuePretrainObjective,
    DiffusionConfig,
    DLMObjective,
    ObjectiveManager,
    States,
    ViewPlan,
    create_objective_manager,
    decoder_states,
)
from wrinklefree.objectives.states import DecoderStates
from wrinklefree.objectives.views import flex_view_mask, uniform, view_mask

MASK, BLOCK, LENGTH = 2, 4, 24
PLAN = ViewPlan(block_size=BLOCK, seed=3)
FAMILIES = [tiny_llama, tiny_qwen3, tiny_gemma3]
"""Gemma 3's first layer sees 6 tokens back, which is less than the sample and more than a block."""


def made_batch(
    *, lengths: tuple[tuple[int, ...], ...] = ((24,), (9, 15), (3, 10, 11)), seed: int = 0
) -> Batch:
    """One sample for each tuple, of documents that long."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, 512, (len(lengths), LENGTH), generator=generator)
    places = torch.stack([torch.cat([torch.arange(n) for n in sample]) for sample in lengths])
    documents = torch.stack(
        [torch.cat([torch.full((n,), i) for i, n in enumerate(sample)]) for sample in lengths]
    )
    return Batch(
        input_ids=input_ids,
        labels=input_ids.masked_fill(places == 0, -100),
        position_ids=places,
        document_ids=documents,
        source_id=torch.zeros(len(lengths), dtype=torch.int64),
        sample_id=torch.arange(len(lengths)) + 100,
    )


def student(make: Any = tiny_llama, **config: Any) -> PreTrainedModel:
    """Converted, at λ = 0, with a [MASK]."""
    model: PreTrainedModel = make(**config)
    convert_to_bitnet(model)
    set_quant_amount(model, 0.0)
    set_block_diffusion(model, BlockDiffusion(mask_token_id=MASK, block_size=BLOCK))
    return model


@torch.no_grad()
def parts(model: nn.Module, batch: Batch, plan: ViewPlan = PLAN) -> list[Tensor]:
    """Hidden states of the clean part and of each masked one."""
    states = decoder_states(model, batch, views=plan.draw(batch), plan=plan)
    return list(states.hidden.split(LENGTH, dim=1))


def seen_by_the_rule(batch: Batch, sample: int, num_views: int, window: int | None) -> Tensor:
    """The rule in words, one pair at a time."""
    document, place = batch.document_ids[sample].tolist(), batch.position_ids[sample].tolist()
    allowed = torch.zeros((1 + num_views) * LENGTH, (1 + num_views) * LENGTH, dtype=torch.bool)
    for query in range(len(allowed)):
        for key in range(len(allowed)):
            (query_part, row), (key_part, column) = divmod(query, LENGTH), divmod(key, LENGTH)
            if document[row] != document[column]:
                continue
            if window is not None and abs(place[row] - place[column]) >= window:
                continue
            own, other = place[row] // BLOCK, place[column] // BLOCK
            if query_part == 0:
                seen = key_part == 0 and place[column] <= place[row]
            elif key_part == 0:
                seen = other < own
            else:
                seen = key_part == query_part and other == own
            allowed[query, key] = seen
    return allowed


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("num_views", [1, 2])
def test_the_mask_is_the_rule(num_views: int, window: int | None) -> None:
    batch = made_batch()
    mask = view_mask(
        batch.document_ids,
        batch.position_ids,
        block_size=BLOCK,
        num_views=num_views,
        sliding_window=window,
    )
    flexible = flex_view_mask(batch, block_size=BLOCK, num_views=num_views, sliding_window=window)
    places = torch.arange(mask.shape[-1])

    for sample in range(len(batch)):
        expected = seen_by_the_rule(batch, sample, num_views, window)
        assert torch.equal(mask[sample, 0], expected)
        number = torch.tensor(sample)
        assert torch.equal(
            flexible.mask_mod(number, torch.tensor(0), places[:, None], places[None, :]), expected
        )


@pytest.mark.parametrize("make", FAMILIES)
def test_clean_states_are_those_of_a_plain_forward_under_any_mask(make: Any) -> None:
    model, batch = student(make), made_batch()
    with torch.no_grad():
        plain = decoder_states(model, batch).logits

    for plan in (PLAN, ViewPlan(block_size=BLOCK, seed=4), ViewPlan(block_size=BLOCK, complementary=False)):
        states = decoder_states(model, batch, views=plan.draw(batch), plan=plan)
        clean = states.head(states.hidden[:, :LENGTH])
        torch.testing.assert_close(clean[..., MASK + 1 :], plain[..., MASK + 1 :], rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", FAMILIES)
def test_a_clean_token_is_seen_by_later_blocks_of_its_document_alone(make: Any) -> None:
    model, batch = student(make), made_batch()
    views = PLAN.draw(batch)
    sample, changed = 1, 13  # the second document, from 9 on: place 4, the first of its block 1
    with torch.no_grad():
        before = decoder_states(model, batch, views=views, plan=PLAN).hidden.split(LENGTH, dim=1)
        other = batch.input_ids.clone()
        other[sample, changed] = 7
        inputs = views.tokens(batch.input_ids, MASK)
        inputs[sample, changed] = 7  # in the clean part only
        after = _run(model, batch, inputs).split(LENGTH, dim=1)

    assert torch.equal(after[0][sample, :changed], before[0][sample, :changed])
    assert not torch.equal(after[0][sample, changed], before[0][sample, changed])
    next_block = 9 + 2 * BLOCK
    for view in (1, 2):
        assert torch.equal(after[view][sample, :next_block], before[view][sample, :next_block])
        assert not torch.equal(after[view][sample, next_block], before[view][sample, next_block])
    for each in (0, 2):  # the other samples
        assert all(torch.equal(new[each], old[each]) for new, old in zip(after, before, strict=True))


@pytest.mark.parametrize("make", FAMILIES)
def test_nothing_crosses_documents_or_views(make: Any) -> None:
    model, batch = student(make), made_batch(lengths=((8, 16),))
    inputs = PLAN.draw(batch).tokens(batch.input_ids, MASK)
    before = _run(model, batch, inputs)

    changed = inputs.clone()
    for part in range(3):
        changed[:, part * LENGTH : part * LENGTH + 8] = 9  # the first document, everywhere
    after = _run(model, batch, changed)
    for old, new in zip(before.split(LENGTH, dim=1), after.split(LENGTH, dim=1), strict=True):
        assert torch.equal(new[:, 8:], old[:, 8:])

    changed = inputs.clone()
    changed[:, LENGTH : 2 * LENGTH] = 9  # the whole first view
    after = _run(model, batch, changed)
    assert torch.equal(after[:, :LENGTH], before[:, :LENGTH])
    assert torch.equal(after[:, 2 * LENGTH :], before[:, 2 * LENGTH :])


@torch.no_grad()
def _run(model: nn.Module, batch: Batch, inputs: Tensor) -> Tensor:
    """Hidden states of given tokens [B, 3 · T]: the views' own mask, but any content."""
    states = decoder_states(model, batch, views=_Given(inputs), plan=PLAN)  # type: ignore[arg-type]
    return states.hidden


class _Given:
    """In the place of views: their tokens, as they are."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return self.inputs.shape[1] // LENGTH - 1

    def tokens(self, input_ids: Tensor, mask_token_id: int) -> Tensor:
        return self.inputs


@pytest.mark.parametrize("mask_prob", [None, 0.0, 0.15, 1.0])
def test_two_views_mask_every_token_that_may_be_once(mask_prob: float | None) -> None:
    batch = made_batch()
    batch.labels[0, 6:12] = -100
    views = ViewPlan(block_size=BLOCK, mask_prob=mask_prob, seed=1).draw(batch)

    may_be = (batch.labels != -100) & (batch.position_ids % BLOCK != 0)
    first, second = views.masked
    assert torch.equal(first | second, may_be)
    assert not (first & second).any()
    if mask_prob in (0.0, 1.0):
        assert torch.equal(first if mask_prob else second, may_be)
    tokens = views.tokens(batch.input_ids, MASK)
    assert torch.equal(tokens[:, :LENGTH], batch.input_ids)
    assert torch.equal(tokens[:, LENGTH : 2 * LENGTH] == MASK, first)
    assert torch.equal(tokens[:, 2 * LENGTH :] == MASK, second)


def test_masks_are_a_function_of_seed_sample_and_place() -> None:
    whole = made_batch()
    last = Batch(*(getattr(whole, name)[2:] for name in Batch.__dataclass_fields__))

    drawn, alone = PLAN.draw(whole).masked, PLAN.draw(last).masked

    assert all(torch.equal(a[2:], b) for a, b in zip(drawn, alone, strict=True))
    again = PLAN.draw(replace(whole, sample_id=whole.sample_id + 1)).masked[0]
    assert not torch.equal(again, drawn[0])
    assert not torch.equal(replace(PLAN, seed=4).draw(whole).masked[0], drawn[0])


def test_uniform_numbers_are_those_of_splitmix64() -> None:
    """Written with Python's integers, after Steele, Lea and Flood's reference code."""
    bits = (1 << 64) - 1

    def mixed(state: int) -> int:
        state = (state + 0x9E3779B97F4A7C15) & bits
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & bits
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & bits
        return state ^ (state >> 31)

    seed, stream = (1 << 62) + 5, 1
    samples, places = torch.tensor([0, 1, 2**40]), torch.tensor([5, 0, 2047])

    found = uniform(seed, stream, samples, places).tolist()

    expected = [
        (mixed(mixed(mixed((2 * seed + stream) & bits) ^ sample) ^ place) >> 11) / 2**53
        for sample, place in zip(samples.tolist(), places.tolist(), strict=True)
    ]
    assert found == expected


def test_shares_of_blocks_and_masks_are_even() -> None:
    """Over 3,000 blocks: the share of a block is even in [0, 1], so half is masked, with variance 1/12."""
    plan = ViewPlan(block_size=256, seed=9)
    num = 3000
    places = torch.arange(256).expand(num, -1)
    zeros = torch.zeros(num, 256, dtype=torch.int64)
    batch = Batch(zeros, zeros, places, zeros, zeros[:, 0], torch.arange(num))

    shares = plan.draw(batch).masked[0][:, 1:].double().mean(dim=1)

    assert abs(shares.mean() - 0.5) < 4 * math.sqrt(1 / 12 / num)
    assert abs(shares.var() - 1 / 12) < 0.01
    counted = torch.histc(shares, 10, 0, 1)
    assert counted.min() > 0.8 * num / 10


def expected_loss(model: nn.Module, batch: Batch, weighting: str) -> tuple[Tensor, int]:
    """The papers' sum, one masked token at a time, and its count."""
    views = PLAN.draw(batch)
    inputs = views.tokens(batch.input_ids, MASK)
    num_views = len(views)
    mask = torch.stack([seen_by_the_rule(batch, i, num_views, None)[None] for i in range(len(batch))])
    logits = model(
        inputs, position_ids=batch.position_ids.repeat(1, 1 + num_views), attention_mask=mask
    ).logits
    logits[..., MASK] = -torch.inf
    log_probs = logits.double().log_softmax(-1)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for view, (masked, probability) in enumerate(zip(views.masked, views.probability, strict=True), start=1):
        for sample, place in masked.nonzero().tolist():
            weight = 1 / probability[sample, place].item() if weighting == "llada" else 1.0
            word = batch.input_ids[sample, place]
            total = total - weight * log_probs[sample, view * LENGTH + place - 1, word]
            count += 1
    return total, count


@pytest.mark.parametrize("weighting", ["fast_dllm", "llada"])
def test_the_loss_is_that_of_the_paper_and_so_is_its_gradient(weighting: str) -> None:
    model, batch = student(), made_batch()
    objective = DLMObjective(plan=PLAN, weighting=weighting)
    manager = ObjectiveManager({"dlm": objective}, plan=PLAN)
    expected, num_masked = expected_loss(model, batch, weighting)
    count = objective.count(batch)
    expected_gradients = torch.autograd.grad(expected / count, list(model.parameters()))

    output = manager.step(model, None, batch, {"dlm": count})
    output.loss.backward()

    # Both views together mask each token once; 1 / p is one draw of a sum over both views' tokens.
    assert count == (num_masked if weighting == "fast_dllm" else 2 * num_masked)
    torch.testing.assert_close(output.loss.double(), expected / count, rtol=1e-5, atol=0)
    for parameter, gradient in zip(model.parameters(), expected_gradients, strict=True):
        assert parameter.grad is not None
        scale = gradient.abs().max().item()
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=2e-5 * scale + 1e-9)


@pytest.mark.parametrize("complementary", [True, False])
@pytest.mark.parametrize("weighting", ["fast_dllm", "llada"])
def test_a_model_that_guesses_has_the_loss_of_a_guess_on_average(weighting: str, complementary: bool) -> None:
    """Logits of zero: ln of the vocabulary without [MASK]. With 1 / p that holds on average only."""
    plan = ViewPlan(block_size=8, complementary=complementary, mask_prob=0.3, seed=5)
    batch = made_batch(lengths=((24,),) * 400)
    objective = DLMObjective(plan=plan, weighting=weighting)
    logits = torch.zeros(400, LENGTH * (1 + plan.num_views), 16)
    logits[..., MASK] = -torch.inf
    small = replace(batch, input_ids=batch.input_ids % 13 + 3)
    states = replace(DecoderStates.from_logits(logits), num_parts=1 + plan.num_views)
    loss = objective(States(student=states, views=plan.draw(small)), small)

    tolerance = 0.05 if weighting == "llada" else 1e-5
    assert float(loss.mean()) == pytest.approx(math.log(15), rel=tolerance)


@pytest.mark.parametrize("mask_prob", [0.0, 1.0])
def test_a_view_that_never_masks_is_not_counted(mask_prob: float) -> None:
    plan, batch = ViewPlan(block_size=8, mask_prob=mask_prob), made_batch(lengths=((24,),))
    small = replace(batch, input_ids=batch.input_ids % 13 + 3)
    states = replace(DecoderStates.from_logits(torch.zeros(1, 3 * LENGTH, 16)), num_parts=3)

    loss = DLMObjective(plan=plan, weighting="llada")(States(student=states, views=plan.draw(small)), small)

    assert float(loss.mean()) == pytest.approx(math.log(16))


def test_the_cut_into_micro_batches_and_twice_the_batch_change_nothing() -> None:
    model, batch = student(), made_batch()
    batch.labels[1, 10:] = -100
    manager = ObjectiveManager({"dlm": DLMObjective(plan=PLAN)}, plan=PLAN)
    whole = manager.losses(model, None, batch)["dlm"]
    cut = [
        manager.losses(
            model, None, Batch(*(getattr(batch, name)[i : i + 1] for name in Batch.__dataclass_fields__))
        )
        for i in range(len(batch))
    ]
    twice = Batch(*(torch.cat([getattr(batch, name)] * 2) for name in Batch.__dataclass_fields__))

    doubled = manager.losses(model, None, twice)["dlm"]

    assert sum(int(part["dlm"].count) for part in cut) == whole.count
    together = torch.stack([part["dlm"].total for part in cut]).sum()
    torch.testing.assert_close(together, whole.total, rtol=1e-6, atol=0)
    torch.testing.assert_close(doubled.mean(), whole.mean(), rtol=1e-6, atol=0)


def test_without_a_label_the_loss_is_zero_with_a_graph() -> None:
    model, batch = student(), made_batch()
    batch.labels.fill_(-100)
    manager = ObjectiveManager({"dlm": DLMObjective(plan=PLAN)}, plan=PLAN)

    output = manager.step(model, None, batch, manager.counts(batch))
    output.loss.backward()

    assert output.loss == 0
    assert manager.counts(batch) == {"dlm": 0}
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_without_weight_it_is_the_plain_forward_and_its_bits() -> None:
    model, batch = student(), made_batch()
    lengths: list[int] = []
    body = model.get_submodule("model")
    body.register_forward_pre_hook(
        lambda m, args, named: lengths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    specs = {"continue_pretrain": {"weight": 1.0}, "dlm": {"weight": 0.5}}
    manager = create_objective_manager(specs, diffusion=DiffusionConfig(block_size=BLOCK))
    alone = ObjectiveManager({"continue_pretrain": ContinuePretrainObjective()})

    manager.set_weights({"dlm": 0.0})
    without = manager.step(model, None, batch, manager.counts(batch)).loss
    expected = alone.step(model, None, batch, alone.counts(batch)).loss
    manager.set_weights({"dlm": 0.5})
    manager.step(model, None, batch, manager.counts(batch))

    assert torch.equal(without, expected)
    assert lengths == [LENGTH, LENGTH, 3 * LENGTH]


def test_views_of_the_causal_mode_run_alone() -> None:
    """Each part is a plain causal forward of its own tokens."""
    model, batch = student(), made_batch()
    plan = replace(PLAN, causal=True)
    views = plan.draw(batch)

    found = parts(model, batch, plan)

    for part, tokens in zip(found, views.tokens(batch.input_ids, MASK).split(LENGTH, dim=1), strict=True):
        with torch.no_grad():
            alone = decoder_states(model, replace(batch, input_ids=tokens)).hidden
        torch.testing.assert_close(part, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", FAMILIES)
def test_eager_attention_gives_the_same(make: Any) -> None:
    batch = made_batch()
    expected = parts(student(make), batch)
    model = student(make)
    config_of(model)._attn_implementation = "eager"

    for ours, theirs in zip(parts(model, batch), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_mask_behind_the_vocabulary_changes_no_loss() -> None:
    """Logits of [MASK] are in no softmax: cut off at the end, or −∞ in the middle."""
    model, batch = tiny_llama(), made_batch()
    alone = ObjectiveManager({"continue_pretrain": ContinuePretrainObjective()})
    expected = alone.step(model, None, batch, alone.counts(batch)).loss
    expected_gradient = torch.autograd.grad(expected, model.model.embed_tokens.weight)[0]

    model = tiny_llama()
    set_block_diffusion(model, BlockDiffusion(mask_token_id=add_mask_token(model), block_size=BLOCK))
    found = alone.step(model, None, batch, alone.counts(batch)).loss
    gradient = torch.autograd.grad(found, model.model.embed_tokens.weight)[0]

    assert torch.equal(found, expected)
    torch.testing.assert_close(gradient[:-1], expected_gradient, rtol=0, atol=1e-9)
    assert not gradient[-1].any()


def test_a_label_of_the_mask_itself_asks_for_no_loss() -> None:
    model, batch = student(), made_batch()
    batch.input_ids[0, 5] = batch.labels[0, 5] = MASK
    manager = ObjectiveManager({"continue_pretrain": ContinuePretrainObjective()})
    manager.diffusion = BlockDiffusion(mask_token_id=MASK, block_size=BLOCK)

    prepared = manager.preprocess_batch(batch)
    output = manager.step(model, None, prepared, manager.counts(prepared))

    assert prepared.labels[0, 5] == -100
    assert batch.labels[0, 5] == MASK
    logits = model(batch.input_ids[:1]).logits[0].double()
    logits[:, MASK] = -torch.inf
    labels = prepared.labels[0].roll(-1)[:-1]
    alone = replace_rows(prepared, slice(0, 1))
    one = manager.step(model, None, alone, manager.counts(alone)).loss
    torch.testing.assert_close(one.double(), F.cross_entropy(logits[:-1], labels), rtol=1e-5, atol=0)
    assert torch.isfinite(output.loss)


def replace_rows(batch: Batch, rows: slice) -> Batch:
    return Batch(*(getattr(batch, name)[rows] for name in Batch.__dataclass_fields__))


def test_a_model_without_a_mask_is_one_line() -> None:
    manager, batch = ObjectiveManager({"dlm": DLMObjective(plan=PLAN)}, plan=PLAN), made_batch()

    with pytest.raises(UserError, match=r"^training\.diffusion: the model has no \[MASK\]"):
        manager.step(tiny_llama(), None, batch, manager.counts(batch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, r"block_size: must be 2 or more"),
        ({"mask_prob": 1.5}, r"mask_prob: must be 0 to 1"),
        ({"mask_prob": 0.0, "complementary": False}, r"mask_prob: must be above 0"),
        ({"mask_token_id": -1}, r"mask_token_id: must be 0 or more"),
    ],
)
def test_what_a_configuration_gets_wrong_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DiffusionConfig(**options)


def test_what_is_taken_from_inside_is_of_the_clean_tokens() -> None:
    model, batch = student(tiny_qwen3), made_batch()
    with torch.no_grad():
        plain = decoder_states(model, batch, hidden_states=True, relations=(-1,))
        beside = decoder_states(
            model, batch, views=PLAN.draw(batch), plan=PLAN, hidden_states=True, relations=(-1,)
        )
        outputs = model.get_submodule("model")(
            batch.input_ids, position_ids=batch.position_ids, output_hidden_states=True
        )

    assert len(beside.layers) == len(outputs.hidden_states) - 1
    for ours, theirs in zip(beside.layers, plain.layers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for ours, theirs in zip(beside.relations[-1], plain.relations[-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    # The first sample is one document, which transformers masks by itself.
    torch.testing.assert_close(plain.layers[0][:1], outputs.hidden_states[1][:1], rtol=0, atol=1e-5)


def test_attention_is_told_of_each_part() -> None:
    """QK-clip looks at the logits of masked views, too."""
    from wrinklefree.attention import AttentionInput, observed

    model, batch = student(), made_batch()
    seen: list[AttentionInput] = []
    layer = model.get_submodule("model.layers.0.self_attn")
    with observed(config_of(model), {layer: seen.append}, wanted_by="test"):
        parts(model, batch)

    assert [(each.query.shape[2], each.key.shape[2]) for each in seen] == [(24, 24), (24, 48), (24, 48)]
    assert config_of(model)._attn_implementation == "sdpa"
