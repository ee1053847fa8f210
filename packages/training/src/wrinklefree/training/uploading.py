"""Every published checkpoint copied to a bucket, beside the training and never in its way.

    publish ─► queue ─► one thread: files ─► read back, sha256 against the manifest ─► manifest.json last
                                   └─ fails: again, three tries in all ─► a warning, an `event` row, and on

A copy without its manifest is none, so a reader never meets half of one. Local checkpoints that wait are not
removed. What is missing at the address when a run starts is copied then; what is missing when it ends is an
error, since somebody counts on it being there.
"""

import contextlib
import hashlib
import logging
import queue
import threading
import time
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from durable import MANIFEST_NAME, ExitCode, UserError, mask_secrets, read_manifest
from wrinklefree.config.schema import RunConfig
from wrinklefree.training.metrics import append_row
from wrinklefree.training.run_directory import RunDirectory

logger = logging.getLogger(__name__)
NUM_TRIES = 3
PIECE = 2**22
"""Bytes that are read at a time."""


class Uploader:
    """A queue of checkpoints and the thread that copies them."""

    def __init__(
        self,
        filesystem: Any,
        folder: PurePosixPath,
        metrics: Path,
        *,
        timeout_seconds: float,
        pause_seconds: float = 1.0,
    ) -> None:
        self.filesystem = filesystem
        self.folder = folder
        self.metrics = metrics
        self.timeout_seconds, self.pause_seconds = timeout_seconds, pause_seconds
        self.failed: dict[Path, str] = {}
        """Checkpoint → why its last copy did not succeed."""
        self._waiting: queue.Queue[Path] = queue.Queue()
        self._pending: list[Path] = []
        self._idle = threading.Condition()
        threading.Thread(target=self._work, name="uploader", daemon=True).start()

    def submit(self, checkpoint: Path) -> None:
        """Copy this one when its turn comes."""
        with self._idle:
            self._pending.append(checkpoint)
        self._waiting.put(checkpoint)

    def submit_missing(self, checkpoints: Path) -> None:
        """Those that an earlier life did not get across."""
        for path in sorted(checkpoints.iterdir()):
            if (path / MANIFEST_NAME).is_file() and not path.name.startswith("."):
                self.submit(path)

    @property
    def pending(self) -> Collection[Path]:
        """Checkpoints that have to stay where they are."""
        with self._idle:
            return set(self._pending)

    def wait(self) -> None:
        """Until nothing is under way, or the time is over."""
        with self._idle:
            self._idle.wait_for(lambda: not self._pending, timeout=self.timeout_seconds)

    def finish(self) -> None:
        """Wait, and try once more what failed; UserError (exit code 5) when something here is not copied."""
        self.wait()
        if not self.pending:
            # Of checkpoints that newer ones have replaced by now nobody needs to hear.
            self.failed = {path: reason for path, reason in self.failed.items() if path.is_dir()}
            for checkpoint in list(self.failed):
                self.submit(checkpoint)
            self.wait()
        late = f"still under way after {self.timeout_seconds:.0f} s"
        missing = dict.fromkeys(self.pending, late) | self.failed
        if missing:
            self.timeout_seconds = 0.0  # it was waited for
            checkpoint, reason = next(iter(missing.items()))
            raise UserError(
                f"gcs.bucket: {len(missing)} checkpoints were not copied",
                f"{checkpoint.name}: {reason}",
                "they are in the run directory; the same command copies what is missing",
                ExitCode.CANNOT_WRITE,
            )

    def _work(self) -> None:
        while True:
            checkpoint = self._waiting.get()
            try:
                self._copy_with_patience(checkpoint)
            finally:
                with self._idle:
                    self._pending.remove(checkpoint)
                    self._idle.notify_all()

    def _copy_with_patience(self, checkpoint: Path) -> None:
        pause, reason = self.pause_seconds, ""
        for attempt in range(NUM_TRIES):
            if attempt:
                time.sleep(pause)
                pause *= 2
            try:
                copy_checkpoint(self.filesystem, checkpoint, self.folder / checkpoint.name)
            except Exception as error:  # whatever a filesystem raises, the run goes on
                text = str(error).splitlines() or [""]
                reason = mask_secrets(f"{type(error).__name__}: {text[0]}")
                continue
            self.failed.pop(checkpoint, None)
            return
        self.failed[checkpoint] = reason
        logger.warning("%s was not copied, tried %d times: %s", checkpoint.name, NUM_TRIES, reason)
        event = {"event": "upload_failed", "checkpoint": checkpoint.name, "reason": reason}
        with contextlib.suppress(OSError):  # a full disk must not end this thread
            append_row(self.metrics, "event", event)


def bucket_address(config: RunConfig) -> str:
    """What fsspec opens."""
    bucket = config.gcs.bucket or ""
    return bucket if "://" in bucket else f"gs://{bucket}"


def run_folder(config: RunConfig, directory: RunDirectory) -> str:
    """Where a run lies in its bucket: as below `output_dir`."""
    return directory.path.relative_to(Path(config.output_dir)).as_posix()


def open_uploader(config: RunConfig, directory: RunDirectory) -> Uploader | None:
    """None when nothing is to be copied; UserError (exit code 2) for an address that cannot be opened."""
    if not config.gcs.enabled:
        return None
    address = bucket_address(config)
    try:
        filesystem, root = fsspec.core.url_to_fs(address)
    except Exception as error:  # a missing package, an unknown protocol, credentials that cannot be read
        raise UserError(
            "gcs.bucket: cannot be opened",
            mask_secrets(f"{address}: {type(error).__name__}: {error}"),
            "check the address; gs:// needs the package gcsfs, s3:// needs s3fs",
        ) from None
    folder = PurePosixPath(root) / run_folder(config, directory) / directory.checkpoints.name
    return Uploader(filesystem, folder, directory.metrics, timeout_seconds=config.gcs.timeout_seconds)


def copy_checkpoint(filesystem: Any, checkpoint: Path, target: PurePosixPath) -> None:
    """Copy a published directory, unless it is there; each file is read back before the manifest follows."""
    manifest_text = (checkpoint / MANIFEST_NAME).read_bytes()
    manifest = read_manifest(checkpoint)
    remote_manifest = str(target / MANIFEST_NAME)
    if filesystem.exists(remote_manifest):
        if filesystem.cat_file(remote_manifest) == manifest_text:
            return
        filesystem.rm_file(remote_manifest)  # from here on the old copy is none
    for name, entry in manifest.files.items():
        remote = str(target / name)
        filesystem.makedirs(str(PurePosixPath(remote).parent), exist_ok=True)
        filesystem.put_file(str(checkpoint / name), remote)
        if _sha256(filesystem, remote) != entry.sha256:
            raise OSError(f"{name} reads back different from what was written")
    filesystem.pipe_file(remote_manifest, manifest_text)


def _sha256(filesystem: Any, path: str) -> str:
    digest = hashlib.sha256()
    with filesystem.open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
