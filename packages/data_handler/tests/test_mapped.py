"""What is read from mapped files is what lies in them, or an error; never a page that is gone.

Each test runs with both ways of copying: through the kernel from the maps, and with `preadv` from the files.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_handler import mapped
from data_handler.mapped import MappedFiles
from durable import UserError

PAGE = 4096


@pytest.fixture(params=["memory", "files"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "files":
        monkeypatch.setattr(mapped, "memory_copier", lambda: None)
    elif mapped.memory_copier() is None:
        pytest.skip("this system does not copy memory between processes")


def mapped_files(directory: Path, *contents: NDArray[np.integer[Any]]) -> MappedFiles:
    files = MappedFiles(np.dtype("<u2"))
    for number, content in enumerate(contents):
        content.astype("<u2").tofile(directory / f"{number}.bin")
        files.add(directory / f"{number}.bin", len(content))
    return files


def whole(files: MappedFiles, number: int, start: int, length: int) -> list[int]:
    found: list[int] = files.read(np.array([number]), np.array([start]), np.array([length])).tolist()
    return found


def test_thousands_of_stretches_come_as_slices_of_the_files_do(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    contents = [rng.integers(0, 2**16, size, dtype=np.uint16) for size in (9000, 0, 70_000, 1)]
    files = mapped_files(tmp_path, *contents)
    number = rng.choice([0, 2, 3], 2500)
    start = (rng.random(2500) * [len(contents[n]) for n in number]).astype(np.int64)
    length = (rng.random(2500) * np.minimum([len(contents[n]) + 1 for n in number] - start, 90)).astype(
        np.int64
    )

    found = files.read(number, start, length)

    expected = [contents[n][s : s + k] for n, s, k in zip(number, start, length, strict=True)]
    assert found.tolist() == np.concatenate(expected).tolist()


def test_stretches_go_to_their_places_and_nowhere_else(tmp_path: Path) -> None:
    files = mapped_files(tmp_path, np.arange(100), np.arange(500, 600))
    out = np.full((3, 4), 7, np.uint16)

    files.read(np.array([1, 0]), np.array([3, 90]), np.array([4, 2]), out=out, places=np.array([8, 1]))

    assert out.tolist() == [[7, 90, 91, 7], [7, 7, 7, 7], [503, 504, 505, 506]]


def test_reads_that_end_early_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, preadv = mapped_files(tmp_path, np.arange(300), np.arange(500, 600)), os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, place: preadv(file, [buffers[0][:7]], place))

    found = files.read(np.array([1, 0]), np.array([3, 90]), np.array([40, 200]))

    assert found.tolist() == [*range(503, 543), *range(90, 290)]


def test_what_cannot_be_copied_from_a_file_that_is_as_it_was_is_an_error(tmp_path: Path) -> None:
    files = mapped_files(tmp_path, np.arange(100), np.arange(100))

    with pytest.raises(UserError, match=r"1\.bin: cannot be read to its end") as caught:
        files.read(np.array([0, 1]), np.array([0, 2**40]), np.array([100, 1]))

    assert caught.value.exit_code == 4


def test_nothing_is_read_from_nowhere(tmp_path: Path) -> None:
    files, none = mapped_files(tmp_path, np.arange(0)), np.empty(0, np.int64)

    assert files.read(none, none, none).tolist() == []
    assert whole(files, 0, 0, 0) == []


@pytest.mark.parametrize(
    "left", [PAGE, PAGE + 100], ids=["whole pages", "within a page, whose rest is zeros"]
)
@pytest.mark.parametrize("start", [0, PAGE // 2, PAGE // 2 + 60, 40_000])
def test_a_file_that_shrank_is_an_error_wherever_one_reads(tmp_path: Path, left: int, start: int) -> None:
    files = mapped_files(tmp_path, np.arange(50_000), np.arange(50_000))
    with (tmp_path / "1.bin").open("r+b") as file:
        file.truncate(left)

    with pytest.raises(UserError, match=r"1\.bin: shrank while it was in use") as caught:
        whole(files, 1, start, 70)

    assert caught.value.exit_code == 4
    assert whole(files, 0, start, 70) == list(range(start, start + 70))


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_vanished_or_was_replaced_is_an_error(tmp_path: Path, replaced: bool) -> None:
    files = mapped_files(tmp_path, np.arange(50_000))
    (tmp_path / "0.bin").rename(tmp_path / "away")
    if replaced:
        np.zeros(50_000, np.uint16).tofile(tmp_path / "0.bin")

    with pytest.raises(UserError, match="was replaced" if replaced else "vanished") as caught:
        whole(files, 0, 0, 70)

    assert caught.value.exit_code == 4
