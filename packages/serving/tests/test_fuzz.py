"""Damaged files are read or refused in one line: every reader of this package, on inputs mutated from a seed.

A failure names its case, which is a function of that number alone.
"""

import contextlib
import random
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitnet_arch import convert_to_bitnet, save_bitnet
from bitnet_arch.record import read_record
from bitnet_arch.testing import tiny_llama
from bitnet_serving import read_sizes
from bitnet_serving.encoding import encode_dense
from bitnet_serving.gguf_reader import read_gguf
from bitnet_serving.gguf_values import MetaValue
from bitnet_serving.gguf_writer import TensorToWrite, write_gguf
from bitnet_serving.safetensors_header import read_header
from durable import UserError, error_line

FEW = 300
MANY = 10_000
NUMBERS = [
    0,
    1,
    2,
    7,
    31,
    32,
    255,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
    2**64 - 1,
]
ODD = [b"\0", b"\xff\xfe", b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b"[" * 3000, b"9" * 5000]
ODD += [b'"\\ud800"', b"../../x", b"A" * 3000, b"true", b'{"a":', b"GGUF", b"\x80\x04\x95"]
LARGEST_GROWTH_KB = 2**20
LONGEST_SECONDS = 5

num_cases = pytest.mark.parametrize("num_cases", [FEW, pytest.param(MANY, marks=pytest.mark.fuzz)])


def mutated(seed: bytes, case: int) -> bytes:
    """`seed` with one to four changes, three of four in its header."""
    rng, data = random.Random(case), bytearray(seed)
    for _ in range(rng.randint(1, 4)):
        end = len(data) + 1 if rng.random() < 0.25 else min(len(data) + 1, 2048)
        place = rng.randrange(end)
        stretch = slice(place, place + rng.randint(1, 64))
        match rng.randrange(8):
            case 0 if place < len(data):
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                del data[stretch]
            case 2:
                del data[place:]
            case 3:
                data[place:place] = data[stretch] * rng.randint(1, 3)
            case 4:
                data[place : place + 8] = struct.pack("<Q", rng.choice(NUMBERS))
            case 5:
                data[place : place + 4] = struct.pack("<I", rng.choice(NUMBERS) % 2**32)
            case 6:
                data[stretch] = rng.choice(ODD)
            case _:
                data[place:place] = rng.choice(ODD)
    return bytes(data)


@contextlib.contextmanager
def at_most_seconds(case: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"case {case} takes more than {LONGEST_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(path: Path, read: Callable[[], object], num_cases: int) -> None:
    """Nothing but `UserError` comes out, each of them one line; some cases are read and some refused."""
    seed = path.read_bytes()
    read()
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for case in range(num_cases):
        path.write_bytes(mutated(seed, case))
        try:
            with at_most_seconds(case):
                read()
        except UserError as error:
            refused += 1
            if "\n" in error_line(error) or path.name not in error.what:
                pytest.fail(f"case {case}: not one line about the file: {error}")
        except Exception as error:
            pytest.fail(f"case {case}: {type(error).__name__}: {error}")
    assert 0 < refused < num_cases
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < LARGEST_GROWTH_KB


@num_cases
def test_gguf(tmp_path: Path, num_cases: int) -> None:
    path, values = tmp_path / "a.gguf", torch.ones(3, 32)
    tensors = [
        TensorToWrite(name=name, format="q8_0", shape=(3, 32), produce=lambda: encode_dense("q8_0", values))
        for name in ("token_embd.weight", "blk.0.attn_q.weight")
    ]
    metadata: dict[str, MetaValue] = {
        "general.architecture": "bitnet",
        "n": 3,
        "e": 0.5,
        "yes": True,
        "l": ["a", "é"],
        "i": [1, 2],
    }
    write_gguf(path, metadata, tensors)

    def read() -> None:
        file = read_gguf(path)
        for name in file.tensors:
            assert file.data(name).sum() >= 0

    fuzz(path, read, num_cases)


@num_cases
def test_safetensors_header(tmp_path: Path, num_cases: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3, 5), "b": torch.ones(7).half(), "c": torch.ones(())}, path, {"format": "pt"})

    fuzz(path, lambda: read_header(path), num_cases)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    model = tiny_llama()
    convert_to_bitnet(model)
    return save_bitnet(model, directory)


@num_cases
def test_record_as_sizes_read_it(checkpoint: Path, num_cases: int) -> None:
    path = checkpoint / "bitnet.json"
    sound = path.read_bytes()
    try:
        fuzz(path, lambda: read_sizes(checkpoint), num_cases)
    finally:
        path.write_bytes(sound)


@num_cases
def test_record(checkpoint: Path, num_cases: int) -> None:
    path = checkpoint / "bitnet.json"
    sound = path.read_bytes()
    try:
        fuzz(path, lambda: read_record(checkpoint), num_cases)
    finally:
        path.write_bytes(sound)
