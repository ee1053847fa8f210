"""Damaged input is read or refused in one line: configs, jsonl and shards, mutated from a seed.

A failure names its case, which is a function of that number alone.
"""

import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_handler import Shards
from data_handler.config import CONFIG_DIR, DataConfig, SourceConfig, load_data_config
from data_handler.packing import pack_blocks
from data_handler.prepare import prepare
from durable import UserError, error_line

pytestmark = pytest.mark.slow

CASES = 300
ODD = [b"\0", b"\xff\xfe", b"-1", b"1e999", b".nan", b"null", b"[]", b"{}", b"&a [*a]", b"[" * 3000]
ODD += [
    b"9" * 40,
    b'"\\ud800"',
    b"\n",
    b"!!python/name:os.system",
    b"../../x",
    b"A" * 30_000,
    b"\xef\xbb\xbf",
]
LARGEST_GROWTH_KB = 2**20


def mutated(seed: bytes, case: int) -> bytes:
    """`seed` with one to four changes: a bit, a stretch lost, doubled or moved, or something odd put in."""
    rng, data = random.Random(case), bytearray(seed)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        stretch = slice(place, place + rng.randint(1, 40))
        match rng.randrange(6):
            case 0 if place < len(data):
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                del data[stretch]
            case 2:
                del data[place:]
            case 3:
                data[place:place] = data[stretch] * rng.randint(1, 3)
            case 4:
                data[stretch] = rng.choice(ODD)
            case _:
                data[place:place] = rng.choice(ODD)
    return bytes(data)


def fuzz(seeds: list[bytes], read: Callable[[bytes], object]) -> None:
    """Nothing but `UserError` comes out, each of them one line; some cases are read and some refused."""
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for case in range(CASES):
        try:
            read(mutated(seeds[case % len(seeds)], case))
        except UserError as error:
            refused += 1
            if "\n" in error_line(error):
                pytest.fail(f"case {case}: several lines: {error}")
        except Exception as error:
            pytest.fail(f"case {case}: {type(error).__name__}: {error}")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert 0 < refused < CASES
    assert grown < LARGEST_GROWTH_KB


def test_configs(tmp_path: Path) -> None:
    def read(data: bytes) -> None:
        (tmp_path / "c.yaml").write_bytes(data)
        assert load_data_config(tmp_path / "c.yaml").weights

    fuzz([path.read_bytes() for path in sorted(CONFIG_DIR.glob("*.yaml"))], read)


@pytest.mark.parametrize("answers_only", [False, True])
def test_jsonl(tmp_path: Path, answers_only: bool) -> None:
    fields = {"messages_field": "messages", "answers_only": True} if answers_only else {}
    text = '{"text": "the owl \\u00e9 \\ud83e\\udd8a", "more": [1, {"x": null}]}\n'
    chat = (
        '{"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "the owl"}]}\n'
    )

    def read(data: bytes) -> None:
        (tmp_path / "a.jsonl").write_bytes(data)
        source = SourceConfig(path=str(tmp_path / "a.jsonl"), max_bad_lines=1, **fields)  # type: ignore[arg-type]
        config = DataConfig(name="c", sources={"a": source}, piece_bytes=10**6, max_line_bytes=10**5)
        try:
            prepare(config, tmp_path / "out")
        finally:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)

    fuzz([(chat if answers_only else text).encode() * 5], read)


@pytest.mark.parametrize("name", ["shards.json", "offsets-00000.bin", "tokens-00000.bin"])
def test_shards(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_text("".join(f"{'owls ' * (n % 4)}in wood {n}\n" for n in range(30)))
    source = SourceConfig(path=str(tmp_path / "a.txt"))
    (report,) = prepare(DataConfig(name="c", sources={"a": source}), tmp_path / "out")
    directory = report.directory / "train"
    sound = (directory / name).read_bytes()

    def read(data: bytes) -> None:
        (directory / name).write_bytes(data)
        shards = Shards.open(directory)
        for index in range(min(shards.num_documents, 40)):
            shards.document(index)
        pack_blocks(
            {0: shards},
            source_id=np.zeros(2, np.int64),
            starts=np.array([0, shards.num_tokens - 5]),
            sample_id=np.arange(2),
            block_size=5,
        )

    read(sound)
    fuzz([sound], read)
