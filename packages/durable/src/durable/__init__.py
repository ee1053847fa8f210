"""Files that are there whole or not at all; errors a user can act on.

    with lock(run_dir):  # one process at a time
        newest = newest_complete(run_dir / "checkpoints").or_raise()
        with publish(run_dir / "checkpoints" / "step_000500", metadata={"step": 500}) as tmp:
            (tmp / "model.safetensors").write_bytes(weights)  # under its name when all of it is on disk

Writing   `publish` a directory or `publish_file`, `withdraw` it; `recover` tidies up after writers that died.
Reading   `verify` checks every byte of a directory, `newest_complete` finds one that passes,
          `read_manifest` reads its list of files and nothing else.
Sharing   `lock` a directory.
Errors    `UserError` with an `ExitCode`; `error_line` is what a command prints; `mask_secrets` for the rest.
"""

from durable.errors import ExitCode, UserError, error_line
from durable.leftovers import recover, withdraw
from durable.lock import LOCK_NAME, lock
from durable.manifest import MANIFEST_NAME, FileEntry, Manifest, read_manifest
from durable.masking import mask_secrets
from durable.newest import Newest, Skipped, newest_complete
from durable.publish import publish, publish_file
from durable.verify import verify

__all__ = [
    "LOCK_NAME",
    "MANIFEST_NAME",
    "ExitCode",
    "FileEntry",
    "Manifest",
    "Newest",
    "Skipped",
    "UserError",
    "error_line",
    "lock",
    "mask_secrets",
    "newest_complete",
    "publish",
    "publish_file",
    "read_manifest",
    "recover",
    "verify",
    "withdraw",
]
