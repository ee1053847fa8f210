"""A packed batch means what its documents mean alone; logits are compared with transformers' own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from data_handler.masks import attention_mask, document_mask, flex_mask

LENGTHS = [[7, 1, 11, 5], [13, 9, 2]]


def documents() -> tuple[Tensor, Tensor]:
    """[2, 24] document and position ids."""
    ids = [[d for d, length in enumerate(row) for _ in range(length)] for row in LENGTHS]
    positions = [[place for length in row for place in range(length)] for row in LENGTHS]
    return torch.tensor(ids), torch.tensor(positions)


def tiny(family: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    if family == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    elif family == "mistral":
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**shape, sliding_window=4))
    else:
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        config = transformers.Gemma3TextConfig(**shape, layer_types=kinds, sliding_window=4)
        model = transformers.Gemma3ForCausalLM(config)
    model.set_attn_implementation("sdpa")
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_logits_of_a_packed_batch_are_those_of_each_document_alone(family: str) -> None:
    model = tiny(family)
    document_ids, position_ids = documents()
    input_ids = torch.randint(1, 61, document_ids.shape)

    with torch.no_grad():
        packed = model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask(model.config, document_ids),
        ).logits
        for row, lengths in enumerate(LENGTHS):
            borders = torch.tensor(lengths).cumsum(0)[:-1]
            alone = [
                model(input_ids=part[None]).logits[0] for part in torch.tensor_split(input_ids[row], borders)
            ]
            # 1e-5: float32 sums of at most 13 terms, in another order.
            torch.testing.assert_close(packed[row], torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_without_the_mask_the_logits_differ(family: str) -> None:
    model = tiny(family)
    document_ids, position_ids = documents()
    input_ids = torch.randint(1, 61, document_ids.shape)
    everything = torch.zeros_like(document_ids)

    with torch.no_grad():
        masked, open_ = (
            model(input_ids=input_ids, position_ids=position_ids, attention_mask=mask).logits
            for mask in (attention_mask(model.config, ids) for ids in (document_ids, everything))
        )

    assert (masked - open_)[:, 14:].abs().max() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_the_mask_is_what_its_sentence_says(causal: bool, window: int | None) -> None:
    document_ids, _ = documents()

    mask = document_mask(document_ids, causal=causal, sliding_window=window)

    assert mask.shape == (2, 1, 24, 24)
    for row in range(2):
        for query in range(24):
            for key in range(24):
                seen = bool(document_ids[row, query] == document_ids[row, key])
                seen &= key <= query or not causal
                seen &= window is None or abs(query - key) < window
                assert bool(mask[row, 0, query, key]) == seen


@pytest.mark.parametrize("window", [None, 3])
def test_flex_attention_gives_the_same(window: int | None) -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    document_ids, _ = documents()
    query, key, value = torch.randn(3, 2, 4, 24, 8)

    ours = flex.flex_attention(query, key, value, block_mask=flex_mask(document_ids, sliding_window=window))

    mask = document_mask(document_ids, sliding_window=window)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_a_kind_of_layer_that_nobody_described_is_refused() -> None:
    class Config:
        layer_types = ("full_attention", "chunked_attention")

    with pytest.raises(ValueError, match="chunked_attention"):
        attention_mask(Config(), documents()[0])
