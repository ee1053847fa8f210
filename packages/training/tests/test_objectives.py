"""One forward without the head: what it gives is what transformers gives, document by document."""

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bitnet_arch import convert_to_bitnet
from bitnet_arch.testing import TINY_MODELS, tiny_gemma3
from data_handler import Batch
from durable import UserError
from wrinklefree.objectives import ContinuePretrainObjective, LossSum, States, decoder_states
from wrinklefree.objectives.states import packed_mask
from wrinklefree.objectives.vocabulary import CHUNK_ELEMENTS

VOCAB_SIZE = 512
LENGTHS = [[9, 1, 14, 5], [13, 16]]
"""Of the documents in two packed samples; longer than the tiny models' windows."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tokens at a time, the fewest."""
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 1)


def packed(documents: list[list[Tensor]]) -> Batch:
    """Samples of whole documents."""
    positions = [torch.cat([torch.arange(len(document)) for document in row]) for row in documents]
    ids = [torch.cat([torch.full_like(document, n) for n, document in enumerate(row)]) for row in documents]
    input_ids, position_ids = torch.stack([torch.cat(row) for row in documents]), torch.stack(positions)
    return Batch(
        input_ids=input_ids,
        labels=input_ids.masked_fill(position_ids == 0, -100),
        position_ids=position_ids,
        document_ids=torch.stack(ids),
        source_id=torch.zeros(len(documents), dtype=torch.int64),
        sample_id=torch.arange(len(documents)),
    )


def some_documents(lengths: list[list[int]]) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [[torch.randint(0, VOCAB_SIZE, (n,), generator=generator) for n in row] for row in lengths]


def loss_of(model: nn.Module, batch: Batch) -> LossSum:
    return ContinuePretrainObjective()(States(student=decoder_states(model, batch)), batch)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def tiny(family: str, attention: str = "sdpa") -> Any:
    model: Any = TINY_MODELS[family]()
    model.set_attn_implementation(attention)
    return model


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """To float32's precision at the size of each parameter's gradient."""
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=5e-6 * scale, msg=name)


@pytest.mark.parametrize("family", TINY_MODELS)
def test_the_next_token_loss_is_transformers_own(family: str) -> None:
    model, batch = tiny(family), packed(some_documents([[70], [70]]))
    theirs = model(input_ids=batch.input_ids, labels=batch.labels).loss
    theirs.backward()
    expected = gradients(model)

    loss = loss_of(model, batch)
    loss.mean().backward()

    assert loss.count == 2 * 69
    torch.testing.assert_close(loss.mean(), theirs)
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_packed_documents_are_worth_what_each_is_alone(family: str, attention: str) -> None:
    model, documents = tiny(family, attention), some_documents(LENGTHS)
    alone = [tiny(family)(input_ids=d[None], labels=d[None]) for row in documents for d in row if len(d) > 1]
    num_predicted = [length - 1 for row in LENGTHS for length in row if length > 1]
    expected = sum(output.loss * n for output, n in zip(alone, num_predicted, strict=True))

    loss = loss_of(model, packed(documents))

    assert loss.count == sum(num_predicted)
    torch.testing.assert_close(loss.total, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_what_stands_in_the_padding_changes_nothing(family: str) -> None:
    documents = some_documents([[17, 12], [24, 5]])
    found = []
    for filler in (0, 77):
        model = tiny(family)
        batch = packed([[kept, torch.full_like(padding, filler)] for kept, padding in documents])
        batch.labels[0, 17:], batch.labels[1, 24:] = -100, -100
        loss = loss_of(model, batch)
        loss.total.backward()
        found.append((loss, gradients(model)))

    (first, first_gradients), (second, second_gradients) = found
    assert first.count == second.count == 16 + 23
    torch.testing.assert_close(first.total, second.total, rtol=0, atol=0)
    # All but the rows of the embedding that the filler itself picks; they get zero from both.
    torch.testing.assert_close(first_gradients, second_gradients, rtol=0, atol=0)


def test_a_label_that_is_not_wanted_is_left_out() -> None:
    model, batch = tiny("llama"), packed(some_documents([[40], [40]]))
    batch.labels[0, 5:30] = -100
    expected = model(input_ids=batch.input_ids, labels=batch.labels).loss

    loss = loss_of(model, batch)

    assert loss.count == 2 * 39 - 25 == ContinuePretrainObjective().count(batch)
    torch.testing.assert_close(loss.mean(), expected)


def test_without_any_label_the_loss_is_zero_and_so_are_all_gradients() -> None:
    model, batch = tiny("llama"), packed(some_documents(LENGTHS))
    batch.labels.fill_(-100)

    loss = loss_of(model, batch)
    loss.mean().backward()

    assert (loss.total.item(), loss.count) == (0, 0)
    found = gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert not any(gradient.any() for gradient in found.values())


def test_a_ternary_student_is_differentiated_as_by_transformers() -> None:
    model, batch = tiny("llama"), packed(some_documents([[50], [50]]))
    convert_to_bitnet(model)
    model(input_ids=batch.input_ids, labels=batch.labels).loss.backward()
    expected = gradients(model)

    loss_of(model, batch).mean().backward()

    assert_same_gradients(gradients(model), expected)


def test_a_soft_cap_on_the_logits_is_kept() -> None:
    model: Any = tiny_gemma3(final_logit_softcapping=0.2)
    batch = packed(some_documents([[30]]))
    output = model(input_ids=batch.input_ids, labels=batch.labels)

    torch.testing.assert_close(decoder_states(model, batch).logits, output.logits)
    torch.testing.assert_close(loss_of(model, batch).mean(), output.loss)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_samples_of_one_document_go_without_a_mask(family: str) -> None:
    model, batch = tiny(family), packed(some_documents([[30], [30]]))
    assert packed_mask(model, batch.document_ids) is None
    expected = decoder_states(model, batch).hidden

    # For a name of ours, transformers would make no mask at all, windows included.
    model.config._attn_implementation = "a name that has no masks"
    mask = packed_mask(model, batch.document_ids)
    assert mask is not None
    model.config._attn_implementation = "sdpa"
    explicit = model.model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).last_hidden_state

    torch.testing.assert_close(explicit, expected)


def test_positions_are_those_of_the_batch() -> None:
    model, batch = tiny("llama"), packed(some_documents(LENGTHS))
    stretched = replace(batch, position_ids=3 * batch.position_ids)
    mask = packed_mask(model, batch.document_ids)
    expected = model.model(
        input_ids=batch.input_ids, position_ids=stretched.position_ids, attention_mask=mask, use_cache=False
    ).last_hidden_state

    found = decoder_states(model, stretched).hidden

    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    # Rotary positions are relative: a shift would not be seen, a stretch is.
    assert not torch.allclose(found, decoder_states(model, batch).hidden)


def test_packing_is_refused_where_attention_takes_no_dense_mask() -> None:
    model, batch = tiny("llama"), packed(some_documents(LENGTHS))
    model.config._attn_implementation = "flash_attention_2"

    with pytest.raises(UserError, match=r"flash_attention_2.*set sdpa") as refused:
        decoder_states(model, batch)

    assert refused.value.exit_code == 2


@pytest.fixture
def process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process alone."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", loopback)
    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Step(nn.Module):
    """What is wrapped for several ranks: a model and its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return loss_of(self.model, batch).mean()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_every_parameter_reaches_the_other_ranks_once(family: str) -> None:
    model, batch = tiny(family), packed(some_documents(LENGTHS))
    loss_of(model, batch).mean().backward()
    expected = gradients(model)
    wrapped = DistributedDataParallel(Step(model))

    # A second round fails if a parameter was not seen in the first.
    for _ in range(2):
        wrapped(batch).backward()
        assert_same_gradients(gradients(model), expected)
