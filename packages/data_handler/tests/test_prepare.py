"""Expected tokens come from the tokenizer itself, expected documents from the files that the test wrote."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import Tokenizer

from data_handler import demo
from data_handler.config import DataConfig, SourceConfig, load_data_config
from data_handler.encoder import load_encoder
from data_handler.prepare import SourceReport, prepare
from data_handler.shards import Shards
from durable import UserError

TOKENIZER = Tokenizer.from_file(str(demo.TOKENIZER_DIR / "tokenizer.json"))
TEXTS = [f"{text} {number}" for number, text in enumerate(demo.documents("stories", stop=150))]


def write_jsonl(path: Path, texts: list[str]) -> str:
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def prepare_one(
    out: Path, *, piece_bytes: int = 2**25, max_line_bytes: int = 2**20, **source: Any
) -> SourceReport:
    config = DataConfig(
        name="t",
        sources={"s": SourceConfig(**source)},
        piece_bytes=piece_bytes,
        max_line_bytes=max_line_bytes,
    )
    return prepare(config, out)[0]


def texts_in(directory: Path) -> list[str]:
    shards = Shards.open(directory)
    documents = [shards.document(index).tolist() for index in range(shards.num_documents)]
    assert all(document[-1] == TOKENIZER.token_to_id("<|endoftext|>") for document in documents)
    return [TOKENIZER.decode(document[:-1], skip_special_tokens=False) for document in documents]


@pytest.mark.parametrize("piece_bytes", [211, 1000, 2**25])
def test_every_line_is_in_exactly_one_piece(tmp_path: Path, piece_bytes: int) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:7])

    prepare_one(tmp_path / "out", path=path, piece_bytes=piece_bytes)

    assert texts_in(tmp_path / "out/s/train") == TEXTS[:7]


def test_ids_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    odd = [
        "",
        " ",
        "a  1 b\n\n 23",
        "né ☃ 漢字 \U0001f600",
        "<|endoftext|> inside",
        "it's  'ere\t\t9",
        *TEXTS[:5],
    ]
    path = write_jsonl(tmp_path / "a.jsonl", odd)

    prepare_one(tmp_path / "out", path=path)

    shards = Shards.open(tmp_path / "out/s/train")
    for index, text in enumerate(odd):
        assert shards.document(index).tolist() == [*TOKENIZER.encode(text, add_special_tokens=False).ids, 0]
    assert load_encoder("demo").is_fast


def test_all_formats_give_the_same_documents(tmp_path: Path) -> None:
    texts = TEXTS[:11]
    plain = Path(write_jsonl(tmp_path / "a.jsonl", texts)).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(plain))
    (tmp_path / "d.txt").write_text("\n".join(texts), encoding="utf-8")
    pq.write_table(pa.table({"text": texts}), tmp_path / "e.parquet", row_group_size=4)

    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.txt", "e.parquet", "[a].jsonl"):
        prepare_one(tmp_path / f"out-{name[0]}", path=str(tmp_path / name))
        assert texts_in(tmp_path / f"out-{name[0]}/s/train") == texts, name


@pytest.mark.slow
def test_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS * 40)
    code = (
        "from pathlib import Path; from data_handler.config import *;"
        "from data_handler.prepare import prepare;"
        f"prepare(DataConfig(name='t', sources={{'s': SourceConfig(path={path!r})}}, piece_bytes=20000),"
        f"Path({str(tmp_path / 'killed')!r}))"
    )
    for attempt in range(8):
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        staging, deadline = tmp_path / "killed", time.monotonic() + 60
        while not list(staging.glob(f".prepare-s/*/piece-*{attempt}")) and time.monotonic() < deadline:
            if process.poll() is not None:
                break
            time.sleep(0.002)
        time.sleep(0.003 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    prepare_one(tmp_path / "killed", path=path, piece_bytes=20000)

    assert texts_in(tmp_path / "killed/s/train") == TEXTS * 40
    assert not list((tmp_path / "killed").glob(".prepare-*"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "is not JSON"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b'{"other": 1}', "field 'text' is missing"),
        (b'{"text": null}', "field 'text' is null"),
        (b'{"text": 12}', "field 'text' is int"),
        (b"[1]", "is not an object"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, "is nested too deep"),
        (b'{"text": "' + b"x" * 2**21 + b'"}', "is longer than"),
    ],
)
@pytest.mark.parametrize("pieces", [1, 3])
def test_a_bad_line_ends_with_its_place(tmp_path: Path, line: bytes, message: str, pieces: int) -> None:
    good = b'{"text": "good"}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, good, good, line, good]))
    piece_bytes = (tmp_path / "a.jsonl").stat().st_size // pieces + 1

    with pytest.raises(UserError) as caught:
        prepare_one(tmp_path / "out", path=str(tmp_path / "a.jsonl"), piece_bytes=piece_bytes)

    assert caught.value.exit_code == 4
    assert "a.jsonl:4: a record of s " in str(caught.value)
    assert message in str(caught.value)


def test_allowed_bad_lines_are_skipped_and_reported(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\nno\n{"text": "b"}\n{}\n')

    report = prepare_one(tmp_path / "out", path=str(tmp_path / "a.jsonl"), piece_bytes=10, max_bad_lines=2)

    assert texts_in(tmp_path / "out/s/train") == ["a", "b"]
    assert [place.rpartition(":")[2] for place, _ in report.bad_lines] == ["2", "4"]
    with pytest.raises(UserError, match=r"a\.jsonl:4"):
        prepare_one(tmp_path / "less", path=str(tmp_path / "a.jsonl"), piece_bytes=10, max_bad_lines=1)


@pytest.mark.parametrize("drop", [False, True])
def test_duplicates_are_counted_across_pieces_and_dropped_when_asked(tmp_path: Path, drop: bool) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x", "y", "x", "z", "y", "x"])

    report = prepare_one(tmp_path / "out", path=path, piece_bytes=20, drop_duplicates=drop)

    assert report.num_duplicates == 3
    assert texts_in(tmp_path / "out/s/train") == (["x", "y", "z"] if drop else ["x", "y", "x", "z", "y", "x"])


def test_the_budget_ends_after_the_document_that_reaches_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    lengths = [len(TOKENIZER.encode(text).ids) + 1 for text in TEXTS]

    prepare_one(tmp_path / "out", path=path, piece_bytes=4000, max_tokens=sum(lengths[:23]) - 1)

    assert Shards.open(tmp_path / "out/s/train").num_tokens == sum(lengths[:23])


def test_what_is_there_stays_until_the_data_changes(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one"])

    assert not prepare_one(tmp_path / "out", path=path).was_there
    assert prepare_one(tmp_path / "out", path=path).was_there
    write_jsonl(tmp_path / "a.jsonl", ["two"])
    assert not prepare_one(tmp_path / "out", path=path).was_there
    assert texts_in(tmp_path / "out/s/train") == ["two"]


def test_a_loss_is_asked_for_on_the_answers_only(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}))

    prepare_one(
        tmp_path / "out", path=str(tmp_path / "a.jsonl"), messages_field="messages", answers_only=True
    )

    shards = Shards.open(tmp_path / "out/s/train")
    ids, loss = shards.document(0), shards.loss(0, shards.num_tokens)
    wanted = TOKENIZER.decode(ids[loss == 1].tolist(), skip_special_tokens=False)
    assert wanted == "two<|im_end|>\nyes<|im_end|>\n"


def test_probe_documents_are_not_in_the_training_shards(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)

    prepare_one(tmp_path / "out", path=path, probe_one_in=5)

    train, probe = texts_in(tmp_path / "out/s/train"), texts_in(tmp_path / "out/s/probe")
    assert sorted(train + probe) == sorted(TEXTS)
    assert probe
    assert not set(train) & set(probe)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_damaged_file_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd not what the name says")

    with pytest.raises(UserError, match="cannot be read") as caught:
        prepare_one(tmp_path / "out", path=str(tmp_path / name))

    assert caught.value.exit_code == 4
    assert name in str(caught.value)


@pytest.mark.parametrize("path", ["nothing.jsonl", "*.jsonl", "."])
def test_a_source_without_files_is_named(tmp_path: Path, path: str) -> None:
    with pytest.raises(UserError) as caught:
        prepare_one(tmp_path / "out", path=str(tmp_path / path))

    assert caught.value.exit_code == 4


def test_a_source_of_weight_zero_is_never_opened(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one"])
    sources = {"a": SourceConfig(path=path), "b": SourceConfig(path="nowhere.jsonl", weight=0.0)}

    reports = prepare(DataConfig(name="t", sources=sources), tmp_path / "out")

    assert [report.name for report in reports] == ["a"]


def test_the_demo_holds_more_than_five_million_tokens() -> None:
    config = load_data_config("demo")
    sample = {name: list(demo.documents(name, stop=60)) for name in config.sources}
    means = {
        name: sum(len(TOKENIZER.encode(text).ids) + 1 for text in texts) / 60
        for name, texts in sample.items()
    }

    assert sum(mean * demo.num_documents(name) for name, mean in means.items()) > 5_500_000
    assert TOKENIZER.get_vocab_size() == 512
