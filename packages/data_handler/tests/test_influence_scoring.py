"""Scoring prepared directories, end to end, with a small Llama."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from data_handler.influence.commands import register
from data_handler.influence.language import language_loss
from data_handler.influence.scoring import draw_blocks, read_scores
from data_handler.packing import pack_blocks
from data_handler.probes import hold_out
from data_handler.shards import ShardHeader, Shards, finish, write_part
from durable import UserError

VOCABULARY, BLOCK = 31, 12


def prepare(directory: Path, *, step: int | None, seed: int) -> Shards:
    """Documents that count up by `step`, or noise."""
    random = np.random.default_rng(seed)
    documents = []
    for _ in range(60):
        start, length = int(random.integers(30)), int(random.integers(8, 19))
        counted = (start + np.arange(length) * (step or 0)) % 30
        tokens = counted if step is not None else random.integers(0, 30, length)
        documents.append(np.append(tokens, 30).astype(np.uint16))
    directory.mkdir(parents=True)
    dtype = np.dtype("<u2")
    part = write_part(directory, 0, documents, dtype)
    header = ShardHeader(
        vocab_size=VOCABULARY,
        eos_token_id=30,
        tokenizer_fingerprint="t",
        source_fingerprint="s",
        source=directory.name,
        licence="none",
        domain="counting",
        split="train",
        parts=(part,),
    )
    finish(directory, header)
    return Shards.open(directory)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def test_the_loss_of_a_packed_sample_is_that_of_its_documents_alone(tmp_path: Path) -> None:
    shards = prepare(tmp_path / "counting", step=1, seed=0)
    model = llama().eval()
    first, second = shards.span(0), shards.span(1)
    length = second[1]
    batch = pack_blocks(
        {0: shards},
        source_id=np.zeros(1, np.int64),
        starts=np.zeros(1, np.int64),
        sample_id=np.zeros(1, np.int64),
        block_size=length,
    )

    found = language_loss(model, batch)

    total, count = 0.0, 0
    for start, stop in (first, second):
        ids = torch.from_numpy(shards.tokens(start, stop).astype(np.int64))[None]
        total += float(model(input_ids=ids, labels=ids).loss.detach()) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert float(found.detach()) == pytest.approx(total / count, rel=1e-5)


def test_score_then_reweight_prefers_the_source_that_is_like_the_probe(tmp_path: Path) -> None:
    counting = prepare(tmp_path / "all", step=1, seed=0)
    useful = tmp_path / "useful"  # as `data prepare` lays it out; the other is shards alone
    hold_out(counting, train_dir=useful / "train", probe_dir=useful / "probe", seed=0, one_in=4)
    prepare(tmp_path / "noise", step=None, seed=2)
    llama().save_pretrained(tmp_path / "model")
    app, runner = typer.Typer(), CliRunner()
    register(app)
    options = ["--num-samples", "20", "--block-size", str(BLOCK), "--out", str(tmp_path / "scores.json")]
    for name in ("useful", "noise"):
        options += ["--source", str(tmp_path / name)]

    scored = runner.invoke(app, ["score", str(tmp_path / "model"), *options, "--probe", str(useful)])
    moved = runner.invoke(
        app, ["reweight", str(tmp_path / "scores.json"), "--out", str(tmp_path / "weights.json")]
    )

    assert scored.exit_code == 0, scored.output
    assert scored.stdout.index("useful") < scored.stdout.index("noise")  # the best first
    assert moved.exit_code == 0, moved.output
    assert "█" in moved.output
    weights = json.loads((tmp_path / "weights.json").read_text())["weights"]
    assert weights["useful"] > 0.5 > weights["noise"] >= 0.05


def test_a_draw_of_blocks_repeats_itself_and_holds_none_twice(tmp_path: Path) -> None:
    shards = prepare(tmp_path / "counting", step=1, seed=0)

    draws = [
        list(draw_blocks(shards, num_samples=30, block_size=BLOCK, batch_size=7, seed=3)) for _ in range(2)
    ]

    ids = [torch.cat([batch.sample_id for batch in one]).tolist() for one in draws]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 30
    with pytest.raises(UserError, match=r"counting: has \d+ blocks of 12 tokens \(found 999 wanted\)"):
        next(draw_blocks(shards, num_samples=999, block_size=BLOCK, batch_size=7, seed=3))


@pytest.mark.parametrize(
    "content", ["", "[" * 100_000, "[]", "{}", '{"format_version": 1, "sources": {"a": {"scores": ["x"]}}}']
)
def test_a_file_that_holds_no_scores_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "scores.json").write_text(content)

    with pytest.raises(UserError, match=r"scores\.json.*data score"):
        read_scores(tmp_path / "scores.json")


def test_weights_that_make_no_sense_name_the_option(tmp_path: Path) -> None:
    scores = {"format_version": 1, "sources": {name: {"scores": [0.0, 1.0]} for name in ("web", "code")}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    app, runner = typer.Typer(), CliRunner()
    register(app)

    for weight, message in {
        "wed=1": "did you mean 'web'",
        "web=x": "NAME=WEIGHT",
        "web=-1": "0 or more",
    }.items():
        result = runner.invoke(app, ["reweight", str(tmp_path / "scores.json"), "--weight", weight])
        assert isinstance(result.exception, UserError)
        assert message in str(result.exception)


@pytest.mark.parametrize("command", ["score", "reweight"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, command: str) -> None:
    app, runner = typer.Typer(), CliRunner()
    register(app)
    missing = (
        [str(tmp_path / "missing"), "--source", "s", "--probe", "p"] if command == "score" else ["s.json"]
    )

    for out in (tmp_path / "nowhere" / "x.json", tmp_path):
        result = runner.invoke(app, [command, *missing, "--out", str(out)])
        assert isinstance(result.exception, UserError)
        assert str(result.exception).startswith("--out: ")
        assert result.exception.exit_code == 5


def test_a_decoder_that_is_nowhere_is_one_line(tmp_path: Path) -> None:
    shards = prepare(tmp_path / "all", step=1, seed=0)
    hold_out(shards, train_dir=tmp_path / "s" / "train", probe_dir=tmp_path / "s" / "probe", seed=0, one_in=4)
    options = [
        "--source",
        str(tmp_path / "s"),
        "--probe",
        str(tmp_path / "s"),
        "--out",
        str(tmp_path / "x.json"),
    ]

    ended = subprocess.run(
        [sys.executable, "-m", "data_handler", "score", "no/such-model", *options],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )

    assert ended.returncode == 4
    assert ended.stderr.startswith("error: no/such-model: cannot be reached")
    assert ended.stderr.count("\n") == 1
