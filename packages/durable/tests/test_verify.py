"""Damage of every kind is found, named and refused, and no manifest, however hostile, does anything else."""

import hashlib
import json
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from durable import UserError, publish, read_manifest, verify


@pytest.fixture
def published(tmp_path: Path) -> Path:
    with publish(tmp_path / "step_000003", metadata={"step": 3, "loss": 0.25}) as temporary:
        (temporary / "model.bin").write_bytes(bytes(range(40)))
        (temporary / "sub" / "deep").mkdir(parents=True)
        (temporary / "sub" / "deep" / "vocab.txt").write_text("ab\n")
        (temporary / "empty").touch()
    return tmp_path / "step_000003"


def refusal(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        verify(directory)
    assert caught.value.exit_code == 4
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


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


def test_a_single_flipped_bit_is_found_anywhere_in_any_file(published: Path) -> None:
    files = [path for path in published.rglob("*") if path.is_file()]
    assert len(files) == 4  # the manifest too

    for path in files:
        whole = path.read_bytes()
        # Every bit of the small files; of the manifest, one of every byte, each in another place.
        for bit in range(0, 8 * len(whole), 9 if path.name == "manifest.json" else 1):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            assert path.name in refusal(published)
        path.write_bytes(whole)
    verify(published)


def test_every_truncation_and_every_extension_is_found_in_every_file(published: Path) -> None:
    for path in [path for path in published.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for content in [*(whole[:size] for size in range(len(whole))), whole + b"\0", whole + b"\n"]:
            path.write_bytes(content)
            text = refusal(published)
            assert path.name in text
            if path.name != "manifest.json":
                assert ("is truncated" if len(content) < len(whole) else "is too long") in text
                assert f"(found {len(content)} bytes)" in text
        path.write_bytes(whole)
    verify(published)


def test_sizes_are_compared_before_anything_is_hashed(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (published / "sub" / "deep" / "vocab.txt").write_bytes(b"")
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("hashed"))

    assert "vocab.txt: is truncated, it had 3 bytes (found 0 bytes)" in refusal(published)


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
def test_damage_is_named(damage: Callable[[Path], object], expected: str, published: Path) -> None:
    damage(published)

    assert expected in refusal(published)


def test_several_differences_are_counted(published: Path) -> None:
    for name in ("x", "y", "z"):
        (published / name).touch()

    assert "x: is not in the manifest; 2 more files differ (found a foreign file)" in refusal(published)


def test_empty_directories_do_not_count(published: Path) -> None:
    (published / "left over").mkdir()

    verify(published)


def signed(content: dict[str, Any]) -> bytes:
    """A manifest as a hostile writer makes it: any content, with a right checksum at its end."""
    files = ",\n".join(json.dumps(item) for item in content["files"])
    body = (
        f'{{\n"format": {json.dumps(content["format"])},\n"version": {json.dumps(content["version"])},\n'
        f'"metadata": {json.dumps(content["metadata"])},\n"files": [\n{files}\n],\n'
    )
    return f'{body}"sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'.encode()


def test_the_hostile_writer_of_these_tests_knows_the_format(published: Path) -> None:
    raw = (published / "manifest.json").read_bytes()

    assert signed(json.loads(raw)) == raw


@pytest.mark.parametrize(
    "path",
    ["../outside", "sub/../../outside", "/etc/passwd", "..", ".", "", "sub//x", "./model.bin", "sub/", "a\\b",
     "a\nb", "manifest.json", "a\0b", "sur\udc80rogate"],
)  # fmt: skip
def test_a_path_that_leads_outside_or_is_ambiguous_is_refused(path: str, published: Path) -> None:
    (published.parent / "outside").write_bytes(b"")
    content = json.loads((published / "manifest.json").read_bytes())
    content["files"].append({"path": path, "size": 0, "sha256": hashlib.sha256(b"").hexdigest()})
    (published / "manifest.json").write_bytes(signed(content))

    assert "lists a file that it must not" in refusal(published)


def edit(change: Callable[[dict[str, Any]], object], published: Path) -> None:
    content = json.loads((published / "manifest.json").read_bytes())
    change(content)
    (published / "manifest.json").write_bytes(signed(content))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda it: it["files"].append(it["files"][0]), "lists a file twice"),
        (lambda it: it["files"].reverse(), "does not match the checksum"),
        (lambda it: it["files"][0].update(size=-1), "has no size and sha256 for 'empty'"),
        (lambda it: it["files"][0].update(size=0.0), "without path, size and sha256 (found entry 0)"),
        (lambda it: it["files"][0].update(size=False), "has no size and sha256 for 'empty'"),
        (lambda it: it["files"][0].update(size=2**70), "is truncated, it had 1180591620717411303424 bytes"),
        (lambda it: it["files"][1].update(sha256="00"), "has no size and sha256 for 'model.bin'"),
        (lambda it: it["files"][1].update(sha256=it["files"][1]["sha256"].upper()), "has no size and sha256"),
        (lambda it: it["files"][1].update(extra=1), "without path, size and sha256 (found entry 1)"),
        (lambda it: it["files"].append("model.bin"), "without path, size and sha256 (found entry 3)"),
        (lambda it: it.update(metadata=[]), "has no metadata (found list)"),
        (lambda it: it.update(format="zip"), "is not a manifest"),
        (lambda it: it.update(version=2), "reads manifests of version 1 (found version 2); fix: upgrade"),
        (lambda it: it.update(version=0), "reads manifests of version 1 (found version 0)"),
        (lambda it: it.update(version=True), "does not match the checksum"),
        (lambda it: it.update(version="1"), "does not match the checksum"),
    ],
)  # fmt: skip
def test_a_manifest_of_wrong_values_is_refused(
    change: Callable[[dict[str, Any]], object], expected: str, published: Path
) -> None:
    edit(change, published)

    assert expected in refusal(published)


@pytest.mark.parametrize(
    "raw",
    [
        b"null",
        b"[]",
        b'{"format": "durable-manifest", "format": "durable-manifest"}',
        b"[" * 100_000,
        b'{"format": "durable-manifest", "version": 1, "files": [], "metadata": {"x": 1e999}}',
        b'{"format": "durable-manifest", "version": 1, "files": [], "metadata": {"x": NaN}}',
        b'{"format": "durable-manifest", "metadata": ' + b'{"x":' * 990 + b"1" + b"}" * 991,
        b'{"format": "durable-manifest", "version": ' + b"9" * 10_000 + b"}",
        b"\xff\xfe{\x00}\x00",
    ],
)  # fmt: skip
def test_json_that_is_no_manifest_is_refused(raw: bytes, published: Path) -> None:
    (published / "manifest.json").write_bytes(raw)

    assert "manifest.json: " in refusal(published)


@pytest.mark.parametrize("depth", range(900, 1000, 7))
def test_nesting_near_the_limit_of_the_interpreter_is_refused(depth: int, published: Path) -> None:
    head = b'{"format": "durable-manifest", "version": 1, "files": [], "metadata": {"x": '
    (published / "manifest.json").write_bytes(head + b"[" * depth + b"]" * depth + b"}}")

    assert "manifest.json: " in refusal(published)


@pytest.mark.parametrize("filler", [b"[],", b'{"a":1},', b'"a",', b"1,", b"["])
def test_a_huge_manifest_is_refused_without_reading_it_whole(filler: bytes, published: Path) -> None:
    huge = published / "manifest.json"
    with huge.open("wb") as file:
        file.write(b'{"format": "durable-manifest", "files": [' + filler)
        file.truncate(2**36)  # a hole: 64 GB that take no room

    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "is larger than any manifest (4,194,304 bytes)" in refusal(published)

    assert time.process_time() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB

    huge.write_bytes((b'{"format": "durable-manifest", "files": [' + filler * 3_000_000)[: 2**22])
    started = time.process_time()
    assert "manifest.json: " in refusal(published)
    assert time.process_time() - started < 5


def test_random_mutations_of_a_manifest_are_refused_or_harmless(published: Path) -> None:
    whole = (published / "manifest.json").read_bytes()
    rng = random.Random(20260101)
    pieces = [
        b"",
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b"../",
        b"\\u0000",
        b"-1",
        b"1e9",
        b"null",
        b"\xff",
        b"\0",
        b" ",
    ]

    for _ in range(500):
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            start = rng.randrange(len(raw))
            stop = start + rng.choice([0, 1, 2, 9, 70])
            raw[start:stop] = rng.choice(
                [*pieces, bytes(raw[rng.randrange(len(raw)) :][:60]), rng.randbytes(3)]
            )
        (published / "manifest.json").write_bytes(raw)
        if bytes(raw) == whole:
            verify(published)
        else:
            refusal(published)


def test_random_contents_under_a_right_checksum_are_refused_or_verify(published: Path) -> None:
    whole = (published / "manifest.json").read_bytes()
    rng = random.Random(20260102)
    values: list[Any] = [
        None,
        True,
        -1,
        0,
        3,
        2**64,
        1.5,
        "",
        "x",
        "../x",
        "/",
        "model.bin",
        [],
        [[]],
        {},
        {"path": "x"},
    ]
    outcomes: set[str | int] = set()

    for _ in range(500):
        content = json.loads(whole)
        holder = rng.choice([content, content["metadata"], *content["files"]])
        holder[rng.choice([*holder.keys(), "new"])] = rng.choice(values)
        try:
            (published / "manifest.json").write_bytes(signed(content))
        except TypeError:  # "files" is no list any more
            (published / "manifest.json").write_bytes(json.dumps(content).encode())
        try:
            verify(published)
            outcomes.add("verified")
        except UserError as error:
            outcomes.add(error.exit_code)

    assert outcomes == {"verified", 4}  # metadata may be anything


def test_a_file_that_cannot_be_read_is_named(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("hashlib.file_digest", fail)

    assert "empty: cannot be read (found Input/output error)" in refusal(published)
