"""Read a published directory back: it is whole, or the first file that is not is named."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from durable.manifest import MANIFEST_NAME, FileEntry, Manifest, damaged, read_manifest
from durable.tree import Tree, look_into, open_plain_file, sha256_of


def verify(directory: str | os.PathLike[str]) -> Manifest:
    """The manifest of `directory`, after checking every byte; UserError (exit code 4) names what differs.

    Exactly the listed files must be there, as plain files: no fewer, no more, no link among them
    (`directory` itself may be reached through one). All names and sizes are compared before anything is
    hashed, so that a truncated checkpoint is refused at once. Empty directories do not count.
    """
    root = Path(directory)
    manifest = read_manifest(root)
    with _readable(root):
        tree = look_into(root)
    _compare_listing(root, manifest, tree)
    for path, entry in manifest.files.items():
        with _readable(root / path):
            _compare_contents(root / path, entry)
    return manifest


def _compare_listing(root: Path, manifest: Manifest, tree: Tree) -> None:
    wrong = {path: (f"is {kind}", None) for path, kind in tree.others.items()} | {
        path: _size_difference(manifest.files.get(path), tree.files.get(path))
        for path in sorted(manifest.files.keys() | tree.files.keys() - {MANIFEST_NAME})
        if path not in tree.others
    }
    differences = [(path, difference) for path, difference in wrong.items() if difference is not None]
    if differences:
        path, (what, found) = differences[0]
        more = f"; {len(differences) - 1} more files differ" if len(differences) > 1 else ""
        raise damaged(root / path, what + more, found)


def _size_difference(listed: FileEntry | None, size: int | None) -> tuple[str, str | None] | None:
    if listed is None:
        return "is not in the manifest", "a foreign file"
    if size is None:
        return "is missing", None
    if size == listed.size:
        return None
    return (
        f"is {'truncated' if size < listed.size else 'too long'}, it had {listed.size} bytes",
        f"{size} bytes",
    )


def _compare_contents(path: Path, entry: FileEntry) -> None:
    descriptor = open_plain_file(path)
    try:
        digest = sha256_of(descriptor)
    finally:
        os.close(descriptor)
    if digest != entry.sha256:
        raise damaged(
            path, "has changed since it was written", f"sha256 {digest[:12]}…, it was {entry.sha256[:12]}…"
        )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise damaged(path, "cannot be read", error.strerror or str(error)) from error
