"""`manifest.json`: what a published directory holds, so that a damaged copy is known from a whole one.

    {
    "format": "durable-manifest",
    "version": 1,
    "metadata": {"step": 500},
    "files": [
    {"path": "model.safetensors", "size": 1234, "sha256": "9f86…"}
    ],
    "sha256": "…"
    }

The digest at its end is that of everything above it, and a manifest counts only when it is, byte for byte,
what `render` makes of its values: a bit that flips here is seen too, wherever it is. Whoever can write the
directory can write a matching manifest: this finds accidents, and keeps hostile paths from leading outside,
but it is no signature.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from durable.errors import ExitCode, UserError
from durable.tree import open_plain_file

MANIFEST_NAME = "manifest.json"
FORMAT = "durable-manifest"
VERSION = 1
LARGEST_MANIFEST = 4 * 2**20
"""Bytes. Enough for some 25,000 files; the worst that fits takes a second and 100 MB to parse."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a published directory."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of a published directory, by sorted relative posix path, and what its writer added."""

    files: Mapping[str, FileEntry]
    metadata: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        """Size of all files together, without the manifest."""
        return sum(entry.size for entry in self.files.values())


def normal_metadata(metadata: Mapping[str, object] | None) -> dict[str, Any]:
    """`metadata` as it will be read back; TypeError or ValueError for what json cannot hold."""
    normal: dict[str, Any] = json.loads(json.dumps(dict(metadata or {}), allow_nan=False))
    return normal


def render(manifest: Manifest) -> bytes:
    """The one text that stands for `manifest`."""
    lines = ",\n".join(
        json.dumps({"path": path, "size": entry.size, "sha256": entry.sha256})
        for path, entry in sorted(manifest.files.items())
    )
    body = (
        f'{{\n"format": "{FORMAT}",\n"version": {VERSION},\n'
        f'"metadata": {json.dumps(dict(manifest.metadata), allow_nan=False)},\n'
        f'"files": [\n{lines}\n],\n'
    )
    return f'{body}"sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'.encode()


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """The manifest of a published directory, without a look at its files; UserError (4) when unsound."""
    path = Path(directory) / MANIFEST_NAME
    if not path.parent.is_dir():
        what = "is not a directory" if os.path.lexists(path.parent) else "there is no such directory"
        raise UserError(
            f"{path.parent}: {what}", fix="give the path of a published one", exit_code=ExitCode.BAD_DATA
        )
    try:
        descriptor = open_plain_file(path)
    except FileNotFoundError:
        raise damaged(path, "is missing, so nobody finished writing this directory") from None
    except OSError as error:
        raise damaged(path, "is not a readable plain file", error.strerror) from None
    with open(descriptor, "rb") as file:  # noqa: PTH123 (a descriptor has no Path)
        try:
            raw = file.read(LARGEST_MANIFEST + 1)
        except OSError as error:
            raise damaged(path, "cannot be read", error.strerror) from None
    if len(raw) > LARGEST_MANIFEST:
        raise damaged(path, f"is larger than any manifest ({LARGEST_MANIFEST:,} bytes)")
    return _parse(path, raw)


def damaged(path: Path, what: str, found: object = None) -> UserError:
    """The error for a published directory that is not what its writer left."""
    fix = "copy it again or use an earlier one; nothing in this directory can be trusted"
    return UserError(f"{path}: {what}", found, fix, ExitCode.BAD_DATA)


def path_problem(path: str) -> str | None:
    """Why `path` cannot stand in a manifest, or None: it must lead to one place, inside the directory."""
    if path == MANIFEST_NAME:
        return "the manifest cannot list itself"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "a path must be relative, without `..`"
    if "\\" in path or not path.isprintable():
        return "a path must be printable, without backslashes"
    return None


def _parse(path: Path, raw: bytes) -> Manifest:
    try:
        content = json.loads(raw.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, "is truncated or not JSON", f"{len(raw)} bytes: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise damaged(path, f"is not a manifest, whose format is {FORMAT!r}")
    version = content.get("version")
    if type(version) is int and version != VERSION:
        raise UserError(
            f"{path}: this release reads manifests of version {VERSION}",
            found=f"version {version}",
            fix="upgrade wrinklefree-durable" if version > VERSION else "write the directory again",
            exit_code=ExitCode.BAD_DATA,
        )
    metadata = content.get("metadata")
    if not isinstance(metadata, dict):
        raise damaged(path, "has no metadata", type(metadata).__name__)
    manifest = Manifest(_parse_files(path, content.get("files")), metadata)
    try:
        intact = render(manifest) == raw
    except (ValueError, RecursionError):  # what json reads and does not write: 1e999, or nested to the limit
        intact = False
    if not intact:
        raise damaged(path, "does not match the checksum at its end")
    return manifest


def _parse_files(manifest_path: Path, listed: object) -> dict[str, FileEntry]:
    if not isinstance(listed, list):
        raise damaged(manifest_path, "has no list of files", type(listed).__name__)
    files: dict[str, FileEntry] = {}
    for index, item in enumerate(listed):
        match item:
            case {"path": str(path), "size": int(size), "sha256": str(sha256)} if len(item) == 3:
                pass
            case _:
                raise damaged(manifest_path, "has a file without path, size and sha256", f"entry {index}")
        if problem := path_problem(path):
            raise damaged(manifest_path, f"lists a file that it must not: {problem}", repr(path))
        if path in files:
            raise damaged(manifest_path, "lists a file twice", repr(path))
        if type(size) is not int or size < 0 or not _SHA256.fullmatch(sha256):
            raise damaged(manifest_path, f"has no size and sha256 for {path!r}", f"{size}, {sha256!r}")
        files[path] = FileEntry(size, sha256)
    return files
