"""W&B in a process of its own, which reads `metrics.jsonl` as it grows.

    run ──► metrics.jsonl ──► this process ──► W&B, or its offline files

Whatever W&B does (hang, crash, answer 500, take memory) it cannot touch the run: the two share a file, and a
pipe whose closing says that the run is over. Then the rest is sent, for some seconds; what is not sent by
then stays in offline files. A resumed run goes on with the same W&B run, by the id in `wandb.json`.
"""

import contextlib
import json
import logging
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from durable import UserError, error_line, mask_secrets, publish_file
from wrinklefree.training.run_naming import generate_run_name

if TYPE_CHECKING:
    # The schema imports torch, which this process does not need.
    from wrinklefree.config.schema import WandBConfig

logger = logging.getLogger(__name__)
NO_TELEMETRY = {"OTEL_SDK_DISABLED": "true", "WANDB_ERROR_REPORTING": "false"}
"""The library's reports about itself wait for dead servers, too."""
POLL_SECONDS = 0.5
GRACE_SECONDS = 5.0
"""How much longer than `timeout_seconds` the process may take."""


class WandBProcess:
    """The run's end of it."""

    def __init__(self, process: subprocess.Popen[str], timeout_seconds: float) -> None:
        self._process = process
        self._timeout_seconds = timeout_seconds

    @classmethod
    def start(cls, config: dict[str, Any], wanted: "WandBConfig", directory: Path) -> "WandBProcess":
        """Begin with the rows that are written from now on. `config` is shown there, masked."""
        identity = _identity(config, wanted, directory)
        metrics = directory / "metrics.jsonl"
        job = {
            "identity": identity,
            "config": config,
            "project": wanted.project,
            "entity": wanted.entity,
            "tags": wanted.tags,
            "timeout_seconds": wanted.timeout_seconds,
            "directory": str(directory.absolute()),
            "offset": metrics.stat().st_size if metrics.is_file() else 0,
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "wrinklefree.training.wandb_process"],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **NO_TELEMETRY},
            text=True,
            start_new_session=True,  # Ctrl-C is for the run; and all it starts can be ended together
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        return cls(process, wanted.timeout_seconds)

    def close(self) -> None:
        """Say that the run is over and wait for it; end it when it takes too long."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            code: int | None = self._process.wait(self._timeout_seconds + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        # Its library leaves a server of its own behind when it dies.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if code != 0:
            logger.warning(
                "W&B %s; metrics.jsonl has every row, and `wandb sync` sends what its offline files hold",
                "took too long and was ended" if code is None else f"ended with exit code {code}",
            )


def require_wandb(wanted: "WandBConfig") -> None:
    """UserError when it is wanted and not installed."""
    from importlib.util import find_spec

    if wanted.enabled and find_spec("wandb") is None:
        raise UserError(
            "training.logging.wandb.enabled: wandb is not installed",
            True,
            "pip install 'wrinklefree[wandb]', or training.logging.wandb.enabled=false",
        )


def _identity(config: dict[str, Any], wanted: "WandBConfig", directory: Path) -> dict[str, str]:
    """Id and name, the same in every life of a run."""
    path = directory / "wandb.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"id": str(content["id"]), "name": wanted.name or str(content["name"])}
    identity = {"id": secrets.token_hex(4), "name": wanted.name or generate_run_name(config)}
    with publish_file(path, replace=True) as file:
        file.write_text(json.dumps(identity) + "\n", encoding="utf-8")
    return identity


def main() -> None:
    """The process: the job is the first line of stdin, and stdin's end is the end of the run."""
    from wrinklefree.training.wandb_tracker import WandBTracker

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = json.loads(sys.stdin.readline())
    directory = Path(job["directory"])
    tracker = WandBTracker(
        job["project"],
        job["entity"],
        tags=job["tags"],
        directory=directory,
        finish_seconds=job["timeout_seconds"],
    )
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    tracker.init_training_run(job["config"], job["identity"]["name"], run_id=job["identity"]["id"])
    print(mask_secrets(f"W&B: {job['identity']['name']}, {tracker.place}"), flush=True)
    with (directory / "metrics.jsonl").open("rb") as file:
        file.seek(job["offset"])
        for row in _rows(file, sys.stdin):
            tracker.log_training_step(as_logged(row))
    tracker.finish()


def as_logged(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `metrics.jsonl` as W&B gets it: steps as they are, other kinds below the kind's name."""
    values = {name: value for name, value in row.items() if name not in ("kind", "version", "samples")}
    if row["kind"] == "step":
        return values
    step = values.pop("step", None)
    return {row["kind"]: values, **({} if step is None else {"step": step})}


def _rows(file: IO[bytes], stdin: IO[str]) -> Iterator[dict[str, Any]]:
    """Whole lines as they come, and after the run's end what is left."""
    torn = b""
    while True:
        is_over = bool(select.select([stdin], [], [], 0)[0]) and stdin.readline() == ""
        for line in iter(file.readline, b""):
            torn += line
            if torn.endswith(b"\n"):
                with contextlib.suppress(ValueError):
                    row = json.loads(torn)
                    if isinstance(row, dict) and "kind" in row:
                        yield row
                torn = b""
        if is_over:
            return
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        print(f"W&B: {error_line(error)}", flush=True)
        sys.exit(1)
