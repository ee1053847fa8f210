"""How far the peak of memory rises, measured in a process of its own, on inputs far larger than that.

VmHWM rather than `ru_maxrss`: a process starts with the latter of the one that started it.
"""

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from data_handler import demo
from data_handler.config import DataConfig, SourceConfig, SourceFormat
from data_handler.prepare import SourceReport, prepare
from data_handler.shards import Shards
from durable import UserError

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
MIB = 2**20
# What reading, a batch and its tokens take by themselves is below 64 MiB; libraries keep some of it.
FIXED = 96 * MIB
CODE = """
import json, re, sys
from pathlib import Path
from data_handler.config import DataConfig, SourceConfig, SourceFormat
from data_handler.prepare import prepare
from durable import UserError

out, warm, source, settings, fast = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
def run(source, target):
    if "format" in source:
        source["format"] = SourceFormat(source["format"])
    prepare(DataConfig(name="t", sources={"s": SourceConfig(**source)}, **settings), target, fast=fast)
run(warm, out / "warm")  # imports, and what libraries allocate once
before, error = peak(), None
try:
    run(source, out / "measured")
except UserError as found:
    error = [found.exit_code, str(found)]
print(json.dumps([peak() - before, error]))
"""


def prepare_here(out: Path, source: dict[str, Any], **settings: Any) -> SourceReport:
    return prepare(DataConfig(name="t", sources={"s": SourceConfig(**source)}, **settings), out)[0]


def prepare_there(
    out: Path, warm: dict[str, Any], source: dict[str, Any], *, fast: bool = True, **settings: Any
) -> Any:
    """(bytes by which the peak rose, error) of a run in another process."""
    arguments = [str(out), *map(json.dumps, (warm, source, settings, fast))]
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def write_lines(path: Path, records: Iterator[dict[str, str]]) -> dict[str, Any]:
    with path.open("w") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
    return {"path": str(path)}


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_line_beyond_the_limit_is_told_and_never_held(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    with gzip.open(path, "wb", compresslevel=1) if suffix else path.open("wb") as file:
        file.write(b'{"text": "good"}\n{"text": "')
        for _ in range(200):
            file.write(b"x" * MIB)
        file.write(b'"}\n')
    warm = write_lines(tmp_path / "warm.jsonl", iter([{"text": "good"}]))

    growth, error = prepare_there(tmp_path, warm, {"path": str(path)}, max_line_bytes=8 * MIB)

    assert error[0] == 4
    assert f"a.jsonl{suffix}:2: a record of s is longer than 8,388,608 bytes" in error[1]
    assert growth < FIXED


@pytest.mark.slow
def test_a_file_far_larger_than_the_memory_it_takes(tmp_path: Path) -> None:
    warm = write_lines(tmp_path / "warm.jsonl", ({"text": "a b", "junk": "x" * 30_000} for _ in range(300)))
    source = write_lines(tmp_path / "a.jsonl", ({"text": "a b", "junk": "x" * 30_000} for _ in range(10_000)))
    assert Path(source["path"]).stat().st_size > 2.9 * FIXED

    growth, error = prepare_there(tmp_path, warm, source, piece_bytes=500 * MIB)

    assert error is None
    assert growth < FIXED / 3


@pytest.mark.slow
def test_a_row_group_far_larger_than_the_memory_it_takes(tmp_path: Path) -> None:
    def write(name: str, num_rows: int) -> dict[str, Any]:
        texts = ["x" * 30_000] * num_rows + ["a b"]
        pq.write_table(
            pa.table({"text": texts, "id": range(num_rows + 1)}),
            tmp_path / name,
            row_group_size=num_rows + 1,
            use_dictionary=False,
            compression="none",
            write_batch_size=32,  # pages of a usual size
        )
        return {"path": str(tmp_path / name), "max_bad_lines": num_rows}

    growth, error = prepare_there(
        tmp_path, write("warm.parquet", 300), write("a.parquet", 10_000), max_line_bytes=20_000
    )

    assert error is None
    assert growth < FIXED
    (entry,) = Shards.open(tmp_path / "measured/s/train").header.parts
    assert entry.num_documents == 1


def test_a_long_value_of_a_parquet_file_is_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None, "b" * 21, "c"]}), tmp_path / "a.parquet")
    source = {"path": str(tmp_path / "a.parquet")}

    with pytest.raises(UserError, match=r"a\.parquet:row group 0:3: .* longer than 20 bytes") as caught:
        prepare_here(tmp_path / "out", source | {"max_bad_lines": 1}, max_line_bytes=20)
    assert caught.value.exit_code == 4
    report = prepare_here(tmp_path / "out", source | {"max_bad_lines": 2}, max_line_bytes=20)
    assert [place.rpartition(":")[2] for place, _ in report.bad_lines] == ["2", "3"]
    assert report.num_documents == 2


@pytest.mark.slow
def test_a_streamed_dataset_far_larger_than_the_memory_it_takes(tmp_path: Path) -> None:
    for name, num in (("warm", 300), ("large", 10_000)):
        (tmp_path / name).mkdir()
        records = ({"text": "a b", "junk": "x" * 30_000} for _ in range(num))
        write_lines(tmp_path / name / "train.jsonl", records)

    growth, error = prepare_there(
        tmp_path,
        {"format": "hf", "path": str(tmp_path / "warm")},
        {"format": "hf", "path": str(tmp_path / "large")},
    )

    assert error is None
    assert Shards.open(tmp_path / "measured/s/train").num_documents == 10_000
    # datasets reads json lines in blocks of 10 MB and keeps a few as Arrow tables.
    assert growth < FIXED


def test_a_long_record_of_a_streamed_dataset_is_told(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data/train.jsonl", iter([{"text": "a"}, {"text": "b" * 21}]))

    with pytest.raises(UserError, match=r"shard 0:2: a record of s is longer than 20 bytes"):
        prepare_here(
            tmp_path / "out",
            {"format": SourceFormat.HF, "path": str(tmp_path / "data")},
            max_line_bytes=20,
        )


@pytest.mark.slow
@pytest.mark.parametrize(("fast", "size"), [(True, 50 * 10**6), (False, 20 * 10**6)])
def test_a_line_of_50_mb_within_the_limit_becomes_its_tokens(tmp_path: Path, fast: bool, size: int) -> None:
    story = " ".join(demo.documents("stories", stop=20)) + "\n"
    num = size // len(story)
    source = write_lines(tmp_path / "a.jsonl", iter([{"text": story * num}]))
    warm = write_lines(tmp_path / "warm.jsonl", iter([{"text": story}]))

    growth, error = prepare_there(tmp_path, warm, source, fast=fast, max_line_bytes=64 * MIB)

    assert error is None
    tokenizer = Tokenizer.from_file(str(demo.TOKENIZER_DIR / "tokenizer.json"))
    one = tokenizer.encode(story, add_special_tokens=False).ids
    shards = Shards.open(tmp_path / "measured/s/train")
    assert shards.num_tokens == num * len(one) + 1
    np.testing.assert_array_equal(shards.tokens(0, num * len(one)).reshape(num, -1), np.tile(one, (num, 1)))
    # The line, its text twice, and three copies of its 4-byte ids, of which there are half as many.
    assert growth < size * (3 + 3 * 2) + FIXED
