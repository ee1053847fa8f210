"""A packed batch means what its documents mean alone; logits are compared with transformers' own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from data_handler import demo
from data_handler.config import DataConfig, SourceConfig
from data_handler.masks import attention_mask, document_mask, flex_mask
from data_handler.packing import pack_blocks
from data_handler.prepare import prepare
from data_handler.shards import Shards

LENGTHS = [[7, 1, 11, 5], [13, 9, 2]]


def documents() -> tuple[Tensor, Tensor]:
    """[2, 24] document and position ids."""
    ids = [[d for d, length in enumerate(row) for _ in range(length)] for row in LENGTHS]
    positions = [[place for length in row for place in range(length)] for row in LENGTHS]
    return torch.tensor(ids), torch.tensor(positions)


def tiny(family: str, vocab_size: int = 61) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
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
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_of_a_packed_batch_are_those_of_each_document_alone(family: str, implementation: str) -> None:
    model = tiny(family)
    model.set_attn_implementation(implementation)
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


CHATS = [
    [("user", "1 + 1?"), ("assistant", "two")],
    [("user", "Why?"), ("assistant", "Because."), ("user", "Are you sure of that?"), ("assistant", "Yes!")],
    [("user", "Sing."), ("assistant", "La, la, la and once more from the beginning: la.")],
    [("user", "A question that nobody answers")],
    [("assistant", "I begin."), ("user", "So do I.")],
]


def chats_alone() -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each chat by itself, from where the tokenizer says that its tokens begin."""
    tokenizer, alone = Tokenizer.from_file(str(demo.TOKENIZER_DIR / "tokenizer.json")), []
    for chat in CHATS:
        text, wanted = "", set[int]()
        for role, content in chat:
            text += f"<|im_start|>{role}\n"
            answer = f"{content}<|im_end|>\n"
            wanted |= set(range(len(text), len(text) + len(answer))) if role == "assistant" else set()
            text += answer
        encoded = tokenizer.encode(text, add_special_tokens=False)
        labels = [
            id_ if first in wanted else -100
            for id_, (first, _) in zip(encoded.ids, encoded.offsets, strict=True)
        ]
        alone.append(([*encoded.ids, 0], [*labels, -100]))
    return alone


@pytest.mark.parametrize("block_size", [29, 64, 127])
def test_packed_answers_have_the_labels_and_the_loss_of_each_chat_alone(
    tmp_path: Path, block_size: int
) -> None:
    lines = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in CHATS]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = SourceConfig(
        path=str(tmp_path / "chats.jsonl"), messages_field="messages", answers_only=True, licence="CC0-1.0"
    )
    prepare(DataConfig(name="chats", sources={"s": source}), tmp_path / "out")
    shards = Shards.open(tmp_path / "out/s/train")
    starts = np.arange(shards.num_tokens // block_size) * block_size
    zeros, model = np.zeros_like(starts), tiny("llama", 512)

    batch = pack_blocks({0: shards}, source_id=zeros, starts=starts, sample_id=zeros, block_size=block_size)
    with torch.no_grad():
        packed = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=attention_mask(model.config, batch.document_ids),
        ).logits

    for row, start in enumerate(starts.tolist()):
        ids, labels = list[int](), list[int]()
        loss, begin = torch.tensor(0.0), 0
        for chat_ids, chat_labels in chats_alone():
            mine = slice(max(0, start - begin), max(0, start + block_size - begin))
            begin += len(chat_ids)
            if piece := chat_ids[mine]:
                alone = [-100, *chat_labels[mine][1:]]
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([piece])).logits[0]
                loss += F.cross_entropy(logits[:-1], torch.tensor(alone[1:]), reduction="sum")
                ids, labels = ids + piece, labels + alone
        assert batch.input_ids[row].tolist() == ids
        assert batch.labels[row].tolist() == labels
        together = F.cross_entropy(packed[row, :-1], batch.labels[row, 1:], reduction="sum")
        # 1e-5 relative: float32 sums of up to 127 losses near ln 512.
        torch.testing.assert_close(together, loss, atol=1e-4, rtol=1e-5)
    assert (batch.labels != -100).any()
