"""Damage of every kind is found, named and refused, and no manifest, however hostile, does anything else."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from durable import read_manifest, verify


def test_a_whole_directory_verifies_also_through_a_link_and_a_relative_path(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (published.parent / "latest").symlink_to(published.name)
    monkeypatch.chdir(published.parent)

    assert verify(published) == verify("latest") == verify("step_000003/") == read_manifest(published)
    assert list(verify(published).files) == ["empty", "model.bin", "sub/deep/vocab.txt"]


def test_digests_are_those_that_sha256sum_prints(published: Path) -> None:
    files = verify(published).files

    assert files["empty"].sha256 == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    for name, entry in files.items():
        assert entry.sha256 == hashlib.sha256((published / name).read_bytes()).hexdigest()


def test_a_single_flipped_bit_is_found_anywhere_in_any_file(
    published: Path, refusal: Callable[[], str]
) -> None:
    files = [path for path in published.rglob("*") if path.is_file()]
    assert len(files) == 4  # the manifest too

    for path in files:
        whole = path.read_bytes()
        # Every bit of the small files; of the manifest, one of every byte, each in another place.
        for bit in range(0, 8 * len(whole), 9 if path.name == "manifest.json" else 1):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            assert path.name in refusal()
        path.write_bytes(whole)
    verify(published)


def test_every_truncation_and_every_extension_is_found_in_every_file(
    published: Path, refusal: Callable[[], str]
) -> None:
    for path in [path for path in published.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for content in [*(whole[:size] for size in range(len(whole))), whole + b"\0", whole + b"\n"]:
            path.write_bytes(content)
            text = refusal()
            assert path.name in text
            if path.name != "manifest.json":
                assert ("is truncated" if len(content) < len(whole) else "is too long") in text
                assert f"(found {len(content)} bytes)" in text
        path.write_bytes(whole)
    verify(published)


def test_sizes_are_compared_before_anything_is_hashed(
    published: Path, refusal: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (published / "sub" / "deep" / "vocab.txt").write_bytes(b"")
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("hashed"))

    assert "vocab.txt: is truncated, it had 3 bytes (found 0 bytes)" in refusal()


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing file": (lambda it: (it / "model.bin").unlink(), "model.bin: is missing"),
    "a foreign file": (lambda it: (it / "a.pkl").touch(), "a.pkl: is not in the manifest"),
    "a foreign file below": (lambda it: (it / "sub/x").touch(), "sub/x: is not in the manifest"),
    "a file behind a link": (lambda it: replace_by_link(it / "model.bin"), "model.bin: is a symbolic link"),
    "a directory behind a link": (lambda it: replace_by_link(it / "sub"), "sub: is a symbolic link"),
    "a dangling link": (lambda it: (it / "x").symlink_to("nowhere"), "x: is a symbolic link"),
    "a pipe": (lambda it: os.mkfifo(it / "x"), "x: is a device, pipe or socket"),
    "a directory for a file": (lambda it: replace_by_directory(it / "model.bin"), "model.bin: is missing"),
    "no manifest": (lambda it: (it / "manifest.json").unlink(), "manifest.json: is missing"),
    "a linked manifest": (
        lambda it: replace_by_link(it / "manifest.json"),
        "manifest.json: is not a readable",
    ),
    "a pipe for a manifest": (
        lambda it: replace_by_pipe(it / "manifest.json"),
        "is not a readable plain file",
    ),
    "an empty manifest": (lambda it: os.truncate(it / "manifest.json", 0), "is truncated or not JSON"),
    "a pickle for a manifest": (lambda it: (it / "manifest.json").write_bytes(b"\x80\x04K\x01."), "not JSON"),
    "no directory": (lambda it: it.rename(it.with_name("moved")), "there is no such directory"),
}


@pytest.mark.parametrize(("damage", "expected"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_named(
    damage: Callable[[Path], object], expected: str, published: Path, refusal: Callable[[], str]
) -> None:
    damage(published)

    assert expected in refusal()


def test_several_differences_are_counted(published: Path, refusal: Callable[[], str]) -> None:
    for name in ("x", "y", "z"):
        (published / name).touch()

    assert "x: is not in the manifest; 2 more files differ (found a foreign file)" in refusal()


def test_empty_directories_do_not_count(published: Path) -> None:
    (published / "left over").mkdir()

    verify(published)


def test_a_file_that_cannot_be_read_is_named(
    published: Path, refusal: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("hashlib.file_digest", fail)

    assert "empty: cannot be read (found Input/output error)" in refusal()
