"""Several processes make what one makes, and leave nothing behind however they end."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from data_handler import demo
from data_handler.config import DataConfig, SourceConfig
from data_handler.prepare import PIECES_AHEAD, SourceReport, prepare
from data_handler.progress import Advance, Work
from data_handler.shards import Shards
from durable import UserError

TOKENIZER = Tokenizer.from_file(str(demo.TOKENIZER_DIR / "tokenizer.json"))
TEXTS = [f"{text} {number % 70}" for number, text in enumerate(demo.documents("stories", stop=90))]
GOOD = [json.dumps({"text": text}) for text in TEXTS]


def prepare_one(out: Path, num_workers: int, *, piece_bytes: int = 4000, **source: Any) -> SourceReport:
    config = DataConfig(name="t", sources={"s": SourceConfig(**source)}, piece_bytes=piece_bytes)
    return prepare(config, out, num_workers=num_workers)[0]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*.bin")}


def texts_in(directory: Path) -> list[str]:
    shards = Shards.open(directory)
    documents = [shards.document(index).tolist() for index in range(shards.num_documents)]
    return [TOKENIZER.decode(document[:-1], skip_special_tokens=False) for document in documents]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_tokens": 3000},
        {"drop_duplicates": True},
        {"drop_duplicates": True, "max_tokens": 9000},
        {"probe_one_in": 5},
    ],
)
def test_any_number_of_processes_makes_the_same_bytes(tmp_path: Path, settings: dict[str, Any]) -> None:
    lines = GOOD[:20] + GOOD[:20] + ["no"] + GOOD[20:] + ["{}"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    path = str(tmp_path / "a.jsonl")

    alone = prepare_one(tmp_path / "alone", 0, path=path, max_bad_lines=2, **settings)
    together = prepare_one(tmp_path / "together", 3, path=path, max_bad_lines=2, **settings)

    assert contents(tmp_path / "together/s") == contents(tmp_path / "alone/s")
    assert together.bad_lines == alone.bad_lines
    assert together.num_tokens == alone.num_tokens


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_first_error_is_told_whichever_is_met_first(tmp_path: Path, num_workers: int) -> None:
    # One process meets the last line at once, while the other has all those before it to encode.
    lines = [*GOOD * 200, "first"]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "second"]))
    size = len("\n".join(lines))

    with pytest.raises(UserError, match=rf"a\.jsonl:{len(lines)}: a record of s is not JSON"):
        prepare_one(tmp_path / "out", num_workers, path=str(tmp_path / "a.jsonl"), piece_bytes=size)
    assert not list((tmp_path / "out").glob(".prepare-s/*/piece-*"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_first_unreadable_file_is_told_whichever_is_met_first(tmp_path: Path, num_workers: int) -> None:
    whole = gzip.compress("\n".join(GOOD * 200).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip at all")

    with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot be read") as caught:
        prepare_one(tmp_path / "out", num_workers, path=str(tmp_path / "*.gz"))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_lines_count_in_the_order_of_the_file(tmp_path: Path, num_workers: int) -> None:
    lines = [*GOOD[:9], "no", *GOOD[9:30], "no", *GOOD[30:31], "no", "no", *GOOD[31:]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))

    with pytest.raises(UserError, match=r"a\.jsonl:34: .*max_bad_lines to 3 or more"):
        prepare_one(tmp_path / "out", num_workers, path=str(tmp_path / "a.jsonl"), max_bad_lines=2)


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("unique", [False, True])
def test_what_comes_after_the_budget_is_as_if_it_were_not_there(
    tmp_path: Path, num_workers: int, unique: bool
) -> None:
    lines = [line for line in GOOD[:20] for _ in range(2)][: None if unique else 20]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, *GOOD[20:40], *["no"] * 3000]))
    lengths = [len(TOKENIZER.encode(text).ids) + 1 for text in TEXTS]
    budget = sum(lengths[:20]) if unique else sum(2 * lengths[place // 2] for place in range(0, 20, 2))

    prepare_one(
        tmp_path / "out",
        num_workers,
        path=str(tmp_path / "a.jsonl"),
        piece_bytes=1500,
        max_tokens=budget,
        drop_duplicates=unique,
    )

    expected = TEXTS[:20] if unique else [text for text in TEXTS[:10] for _ in range(2)]
    assert texts_in(tmp_path / "out/s/train") == expected


def test_a_budget_prepares_few_pieces_ahead_of_a_slow_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(GOOD * 200))
    (tmp_path / "b.jsonl").write_text("not needed, and no JSON")
    for number in range(30):
        (tmp_path / f"c{number}.jsonl").write_text('{"text": "c"}')
    seen: list[int] = []

    def meter(work: Work) -> AbstractContextManager[Advance]:
        return nullcontext(lambda tokens, size: seen.append(tokens))

    budget = 200 * sum(len(TOKENIZER.encode(text).ids) + 1 for text in TEXTS)
    source = SourceConfig(path=str(tmp_path / "*.jsonl"), max_tokens=budget)
    prepare(DataConfig(name="t", sources={"s": source}), tmp_path / "out", num_workers=2, meter=meter)

    assert seen.count(2) <= PIECES_AHEAD * 2  # "c" and its end


def start(out: Path, path: Path, marker: str) -> subprocess.Popen[bytes]:
    config = out.with_suffix(".yaml")
    config.write_text(json.dumps({"name": "t", "piece_bytes": 30000, "sources": {"s": {"path": str(path)}}}))
    command = ["prepare", str(config), "--out", str(out), "--workers", "2"]
    return subprocess.Popen(
        [sys.executable, "-m", "data_handler", *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"MARKER": marker},
    )


def processes_with(marker: str) -> set[int]:
    """Every process that inherited the marker, orphans as well."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"MARKER={marker}".encode() in entry.read_bytes().split(b"\0"):
                found.add(int(entry.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find the processes")
@pytest.mark.parametrize(
    "end", ["a worker is killed", "a worker is stopped", "interrupt", "the parent is killed"]
)
def test_no_process_and_no_half_piece_is_left(tmp_path: Path, end: str) -> None:
    texts = TEXTS * 60
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text("\n".join(GOOD * 60))
    marker = f"{os.getpid()} {end}"
    process = start(out, path, marker)
    deadline = time.monotonic() + 60
    while not list(out.glob(".prepare-s/*/piece-*3")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    workers = processes_with(marker) - {process.pid}
    assert len(workers) == 2

    if end == "a worker is killed":
        os.kill(min(workers), signal.SIGKILL)
    elif end == "a worker is stopped":
        os.kill(min(workers), signal.SIGSTOP)
    else:
        process.send_signal(signal.SIGINT if end == "interrupt" else signal.SIGKILL)
    _, error = process.communicate(timeout=60)

    while processes_with(marker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not processes_with(marker)
    if end.startswith("a worker"):
        assert process.returncode == 4
        how = "killed by SIGKILL" if "killed" in end else "is stopped (found it was sent SIGSTOP)"
        assert how in error.decode().splitlines()[-1]
        assert "Traceback" not in error.decode()
    assert list(out.glob(".prepare-s/*/piece-*"))
    assert all((piece / "manifest.json").is_file() for piece in out.glob(".prepare-s/*/piece-*"))
    prepare_one(out, 2, path=str(path), piece_bytes=30000)
    assert texts_in(out / "s/train") == texts
    assert not list(out.glob(".prepare-*"))
