"""Blocks packed in memory are those that prepared shards give, and hold every token once."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_handler import PackedDataset, Shards, TokenPacker
from data_handler.config import DataConfig, SourceConfig
from data_handler.encoder import load_encoder
from data_handler.packing import pack_blocks
from data_handler.prepare import prepare

TEXTS = [f"{'the owl ' * (n % 5)}{n}" for n in range(40)] + ["a long night " * 30, "", "the end"]
LENGTH = 24


def test_blocks_are_those_of_the_prepared_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    config = DataConfig(name="c", sources={"owls": SourceConfig(path=str(tmp_path / "a.jsonl"))})
    (report,) = prepare(config, tmp_path / "out")
    shards = Shards.open(report.directory / "train")
    starts = np.arange(shards.num_tokens // LENGTH) * LENGTH
    expected = pack_blocks(
        {0: shards},
        source_id=np.zeros(len(starts), np.int64),
        starts=starts,
        sample_id=starts,
        block_size=LENGTH,
    )

    samples = list(PackedDataset(TEXTS, "demo", LENGTH, tokenize_batch_size=7))

    assert len(samples) > 10
    for name in ("input_ids", "labels", "position_ids", "document_ids"):
        assert torch.equal(torch.stack([sample[name] for sample in samples]), getattr(expected, name)), name


def test_no_token_is_lost_or_doubled_whatever_the_batches() -> None:
    encoder = load_encoder("demo")
    stream = [
        token for text in TEXTS for token in [*encoder.encode([text])[0].tolist(), encoder.eos_token_id]
    ]
    packer = TokenPacker(encoder, LENGTH)

    full = [sample for text in TEXTS for sample in packer.add_text(text)]
    waiting = packer.get_remaining_tokens()
    rest = packer.flush()

    assert rest is not None
    assert len(rest["input_ids"]) == waiting == len(stream) % LENGTH
    assert torch.cat([sample["input_ids"] for sample in [*full, rest]]).tolist() == stream
    assert packer.flush() is None


def test_positions_and_labels_by_hand() -> None:
    # Five tokens and their separator, one and its separator, and the first of what the block cuts.
    the_owl, a = [88, 264, 225, 331, 80], load_encoder("demo").encode(["a"])[0].tolist()
    assert len(a) == 1

    (sample,) = TokenPacker("demo", 9, separator_token_id=7).add_texts(["the owl", "a", "the owl"])

    assert sample["input_ids"].tolist() == [*the_owl, 7, *a, 7, 88]
    assert sample["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 0]
    assert sample["document_ids"].tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 2]
    assert sample["labels"].tolist() == [-100, *the_owl[1:], 7, -100, 7, -100]


def test_a_separator_of_id_0_is_taken_at_its_word(tmp_path: Path) -> None:
    # A tokenizer whose own end of text is not 0, or nobody would notice.
    source = load_encoder("demo").directory
    (tmp_path / "tokenizer.json").write_text((source / "tokenizer.json").read_text())
    ends = next(
        token["content"]
        for token in json.loads((source / "tokenizer.json").read_text())["added_tokens"]
        if token["id"] != 0
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": ends}))
    encoder = load_encoder(tmp_path)
    assert encoder.eos_token_id != 0

    (sample,) = TokenPacker(encoder, 6, separator_token_id=0).add_text("the owl")

    assert sample["input_ids"][-1] == 0


def test_reset_forgets_what_waits() -> None:
    packer = TokenPacker("demo", 64)
    packer.add_text("the owl")

    packer.reset()

    assert packer.flush() is None


def test_tokens_of_two_documents_are_told_apart_and_no_mask_says_otherwise() -> None:
    (sample,) = TokenPacker("demo", 12).add_texts(["the owl", "the owl"])

    assert "attention_mask" not in sample
    assert sample["document_ids"].tolist() == [0] * 6 + [1] * 6


def test_a_block_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="max_length"):
        TokenPacker("demo", 0)
