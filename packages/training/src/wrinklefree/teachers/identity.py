"""Whose answers are these? Enough of a teacher to tell it from another, without opening it."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wrinklefree.pretrained import weight_files

EVERY = 2**24
"""Of so many bytes of a file with weights,"""
SAMPLED = 2**16
"""so many are looked at: any training changes all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherIdentity:
    """What its answers depend on, and what is kept of them."""

    backend: str
    name: str
    weights: str | None
    """Fingerprint of the files; none where they are not on this disk, or built in."""
    dtype: str
    tokenizer: str | None
    """Fingerprint of the tokenizer that the data was prepared with."""
    vocab_size: int
    """Tokens that have a probability."""
    excluded: int | None
    """[MASK], where the teacher would give it one."""
    top_k: int
    stored_as: str

    @property
    def fingerprint(self) -> str:
        """Sixteen digits."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self, other: "TeacherIdentity") -> list[str]:
        """`name a → b` for each thing that differs; equal weights may have another name."""
        ours, theirs = asdict(self), asdict(other)
        if self.weights is None or other.weights is None:
            ours["weights"] = theirs["weights"] = None
        elif self.weights == other.weights:
            ours["name"] = theirs["name"]
        return [f"{key} {theirs[key]} → {ours[key]}" for key in ours if ours[key] != theirs[key]]

    @classmethod
    def parsed(cls, content: dict[str, Any]) -> "TeacherIdentity":
        """From `asdict`; TypeError for anything else."""
        return cls(**content)


def weights_fingerprint(name: str) -> str | None:
    """Of the files of a decoder: their sizes, and bytes from all over them."""
    files = weight_files(name)
    if not files:
        return None
    found = hashlib.sha256()
    for path in files:
        _add(found, path)
    return found.hexdigest()[:16]


def _add(found: Any, path: Path) -> None:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        found.update(size.to_bytes(8, "little"))
        for start in [*range(0, size, EVERY), max(0, size - SAMPLED)]:
            file.seek(start)
            found.update(file.read(SAMPLED))
