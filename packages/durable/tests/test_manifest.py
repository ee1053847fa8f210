"""No manifest, however hostile, leads outside its directory, takes long, or does anything but be refused."""

import hashlib
import json
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from durable import UserError, verify


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
def test_a_path_that_leads_outside_or_is_ambiguous_is_refused(
    path: str, published: Path, refusal: Callable[[], str]
) -> None:
    (published.parent / "outside").write_bytes(b"")
    content = json.loads((published / "manifest.json").read_bytes())
    content["files"].append({"path": path, "size": 0, "sha256": hashlib.sha256(b"").hexdigest()})
    (published / "manifest.json").write_bytes(signed(content))

    assert "lists a file that it must not" in refusal()


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
    change: Callable[[dict[str, Any]], object], expected: str, published: Path, refusal: Callable[[], str]
) -> None:
    edit(change, published)

    assert expected in refusal()


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
def test_json_that_is_no_manifest_is_refused(raw: bytes, published: Path, refusal: Callable[[], str]) -> None:
    (published / "manifest.json").write_bytes(raw)

    assert "manifest.json: " in refusal()


@pytest.mark.parametrize("depth", range(900, 1000, 7))
def test_nesting_near_the_limit_of_the_interpreter_is_refused(
    depth: int, published: Path, refusal: Callable[[], str]
) -> None:
    head = b'{"format": "durable-manifest", "version": 1, "files": [], "metadata": {"x": '
    (published / "manifest.json").write_bytes(head + b"[" * depth + b"]" * depth + b"}}")

    assert "manifest.json: " in refusal()


@pytest.mark.parametrize("filler", [b"[],", b'{"a":1},', b'"a",', b"1,", b"["])
def test_a_huge_manifest_is_refused_without_reading_it_whole(
    filler: bytes, published: Path, refusal: Callable[[], str]
) -> None:
    huge = published / "manifest.json"
    with huge.open("wb") as file:
        file.write(b'{"format": "durable-manifest", "files": [' + filler)
        file.truncate(2**36)  # a hole: 64 GB that take no room

    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "is larger than any manifest (4,194,304 bytes)" in refusal()

    assert time.process_time() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB

    huge.write_bytes((b'{"format": "durable-manifest", "files": [' + filler * 3_000_000)[: 2**22])
    started = time.process_time()
    assert "manifest.json: " in refusal()
    assert time.process_time() - started < 5


def test_random_mutations_of_a_manifest_are_refused_or_harmless(
    published: Path, refusal: Callable[[], str]
) -> None:
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
            refusal()


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
