"""Answers of a teacher on disk: a directory of parts that are there whole or not at all.

    teacher.json      whose answers they are (`TeacherIdentity`), and of which sources of data
    HEX.bin           a part: 32 bytes of header, the keys of n samples with a checksum each, n records

    record            T · K ids (uint16, or uint32 for a large vocabulary), T · K log probabilities

A sample is found by a hash of its tokens and of where documents begin in it: that is all that a teacher sees.
Where a sample stands, block, epoch or source, may change with every new weight of the mixture, and does not
matter; a text that is not there is missed, never taken for another. Parts are written by whoever asked the
teacher, each rank its own, and never changed. Whoever is killed loses what was not published yet.

Shapes: B samples, T tokens, K most probable tokens.
"""

import hashlib
import json
import logging
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_handler import Batch
from durable import ExitCode, UserError, publish_file
from wrinklefree.teachers.identity import TeacherIdentity

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "teacher.json"
MAGIC = b"WFTEACH1"
HEADER = np.dtype([("magic", "S8"), ("num_samples", "<u8"), ("length", "<u8"), ("k", "<u8")])
KEY = np.dtype([("key", "V16"), ("crc", "<u4")])
PART_BYTES = 64 * 2**20
"""A part is published when it has grown to this, and whenever the run is saved."""
LARGEST_MANIFEST = 2**20


def keys_of(batch: Batch) -> list[bytes]:
    """16 bytes for each sample: of its tokens and of the documents that they belong to."""
    tokens = batch.input_ids.cpu().numpy().astype("<i8")
    documents = batch.document_ids.cpu().numpy().astype("<i8")
    return [
        hashlib.blake2b(row.tobytes() + borders.tobytes(), digest_size=16).digest()
        for row, borders in zip(tokens, documents, strict=True)
    ]


class TeacherStore:
    """What one teacher said, for samples of one length."""

    def __init__(
        self,
        directory: Path,
        identity: TeacherIdentity,
        *,
        length: int,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        """UserError (exit code 4) when the directory holds answers of another teacher, or of other data."""
        self.directory = directory
        self.identity = identity
        self.length = length
        self.sources = dict(sources or {})
        ids = np.dtype("<u2") if identity.vocab_size <= 2**16 else np.dtype("<u4")
        values = np.dtype("<f2") if identity.stored_as == "fp16" else np.dtype("<f4")
        shape = (length, identity.top_k)
        self._record = np.dtype([("ids", ids, shape), ("log_probs", values, shape)])
        self._pending: dict[bytes, NDArray[Any]] = {}
        self._records: dict[bytes, tuple[NDArray[Any], int, int]] = {}
        """Key → records of its part, which of them, checksum."""
        self._paths: dict[int, Path] = {}
        """id of a part's records → its file."""
        self.require_same()
        for path in sorted(directory.glob("*.bin")):
            self._open(path)

    def __len__(self) -> int:
        return len(self._pending.keys() | self._records.keys())

    def __contains__(self, key: bytes) -> bool:
        return key in self._pending or key in self._records

    def read(self, keys: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        """Ids and log probabilities [B, T, K] of samples that are all there."""
        records = np.stack([self._one(key) for key in keys])
        ids = torch.from_numpy(records["ids"].astype(np.int64))
        return ids, torch.from_numpy(records["log_probs"].astype(np.float32))

    def add(self, keys: Sequence[bytes], ids_BTK: Tensor, log_probs_BTK: Tensor) -> None:
        """Keep what is new, rounded as it will be read."""
        for key, ids, log_probs in zip(keys, ids_BTK.numpy(), log_probs_BTK.numpy(), strict=True):
            if key not in self:
                record = np.empty((), self._record)
                record["ids"], record["log_probs"] = ids, log_probs
                self._pending[key] = record
        if len(self._pending) * self._record.itemsize >= PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Publish what was added."""
        if not self._pending:
            return
        # Somebody else may have begun to fill an empty directory since.
        self.require_same(write=True)
        keys = np.zeros(len(self._pending), KEY)
        keys["key"] = [np.void(key) for key in self._pending]
        keys["crc"] = [zlib.crc32(record.tobytes()) for record in self._pending.values()]
        header = np.array((MAGIC, len(keys), self.length, self.identity.top_k), HEADER)
        path = self.directory / f"{uuid.uuid4().hex}.bin"
        bytes_needed = HEADER.itemsize + len(keys) * (KEY.itemsize + self._record.itemsize)
        with publish_file(path, bytes_needed=bytes_needed) as temporary, temporary.open("wb") as file:
            file.write(header.tobytes())
            file.write(keys.tobytes())
            for record in self._pending.values():
                file.write(record.tobytes())
        self._open(path)
        self._pending.clear()

    def _one(self, key: bytes) -> NDArray[Any]:
        if key in self._pending:
            return self._pending[key]
        records, number, crc = self._records[key]
        record = np.array(records[number])
        if zlib.crc32(record.tobytes()) != crc:
            raise _damaged(self._paths[id(records)], f"the checksum of sample {number}")
        return record

    def _open(self, path: Path) -> None:
        """Map a part; one of another length or k is for other runs."""
        size = path.stat().st_size
        with path.open("rb") as file:
            content = file.read(HEADER.itemsize)
            if len(content) < HEADER.itemsize or not content.startswith(MAGIC):
                raise _damaged(path, f"{size:,} bytes that are no part of a cache")
            header = np.frombuffer(content, HEADER)[0]
            if int(header["length"]) != self.length or int(header["k"]) != self.identity.top_k:
                return
            num_samples = int(header["num_samples"])
            wanted = HEADER.itemsize + num_samples * (KEY.itemsize + self._record.itemsize)
            if size != wanted:
                raise _damaged(path, f"{size:,} bytes, {wanted:,} by its header")
            keys = np.frombuffer(file.read(num_samples * KEY.itemsize), KEY)
        offset = HEADER.itemsize + num_samples * KEY.itemsize
        records = np.memmap(path, self._record, mode="r", offset=offset, shape=(num_samples,))
        self._paths[id(records)] = path
        for number, (key, crc) in enumerate(zip(keys["key"], keys["crc"].tolist(), strict=True)):
            self._records[key.tobytes()] = (records, number, crc)

    def require_same(self, *, write: bool = False) -> None:
        """Are these still the answers of one teacher? UserError (exit code 4) otherwise."""
        path = self.directory / MANIFEST
        sources: dict[str, str] = {}
        if path.exists():
            identity, sources = _read_manifest(path)
            if differences := self.identity.differences(identity):
                raise UserError(
                    f"training.teacher.cache: {self.directory} holds what another teacher said",
                    f"{identity.fingerprint} → {self.identity.fingerprint}: {'; '.join(differences)}",
                    "name another directory, or restore these",
                    ExitCode.BAD_DATA,
                )
            for name, documents in self.sources.items():
                if sources.get(name, documents) != documents:
                    raise UserError(
                        f"training.teacher.cache: {self.directory} is about other data",
                        f"{name} {sources[name][:16]} → {documents[:16]}",
                        "name another directory, or bring the documents back",
                        ExitCode.BAD_DATA,
                    )
        elif any(not found.name.startswith(".") for found in self.directory.glob("*")):
            raise UserError(
                f"training.teacher.cache: {self.directory} is no cache and not empty",
                fix="name another directory",
                exit_code=ExitCode.BAD_DATA,
            )
        if write and (not path.exists() or not self.sources.keys() <= sources.keys()):
            content = {
                "format_version": FORMAT_VERSION,
                "fingerprint": self.identity.fingerprint,
                "teacher": asdict(self.identity),
                "sources": sources | self.sources,
            }
            with publish_file(path, replace=True) as temporary:
                temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read_manifest(path: Path) -> tuple[TeacherIdentity, dict[str, str]]:
    try:
        if path.stat().st_size > LARGEST_MANIFEST:
            raise ValueError("larger than any manifest")
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
        if version == FORMAT_VERSION:
            return TeacherIdentity.parsed(content["teacher"]), dict(content["sources"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from None
    raise UserError(
        f"{path}: was written in format {version}",
        f"this release reads {FORMAT_VERSION}",
        "name another directory",
        ExitCode.BAD_DATA,
    )


def _damaged(path: Path, found: str) -> UserError:
    return UserError(f"{path}: is damaged", found, "remove the file: it is made again", ExitCode.BAD_DATA)
