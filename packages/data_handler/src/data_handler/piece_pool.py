"""Several processes that prepare pieces, or none: then this one does.

Answers come in whatever order they are ready; `prepare` puts them in the order of the pieces.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias

from data_handler.encoder import TextEncoder
from data_handler.piece_worker import Job, error_from_json
from data_handler.progress import Advance
from durable import ExitCode, UserError

_SILENCE = 10.0
"""Seconds without a word, after which the processes are looked at."""

Answer: TypeAlias = dict[str, Any] | UserError
"""What the manifest of a piece says, or why there is none."""


class PiecePool:
    """At most `num_workers` processes, each started with its first job; none for 0 or 1.

    Use as a context manager: however the block ends, no process is left.
    """

    def __init__(self, num_workers: int, encoder: TextEncoder) -> None:
        self.num_workers = max(1, num_workers)
        self._encoder = encoder
        self._here: list[tuple[int, Job]] = []
        self._idle: list[_Worker] = []
        self._busy: dict[int, _Worker] = {}
        self._heard: SimpleQueue[tuple[_Worker, dict[str, Any] | None]] = SimpleQueue()

    def __enter__(self) -> "PiecePool":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        while self._idle:
            self._idle.pop().end()

    @property
    def num_busy(self) -> int:
        """Jobs without an answer."""
        return len(self._busy) + len(self._here)

    @property
    def has_room(self) -> bool:
        """Whether another job would begin at once."""
        return self.num_busy < self.num_workers

    def send(self, index: int, job: Job) -> None:
        """Begin a job; `receive` returns its answer under this number."""
        assert self.has_room, "a job would have to wait"
        if self.num_workers == 1:
            self._here.append((index, job))
            return
        worker = self._idle.pop() if self._idle else _Worker(self._encoder, self._heard.put)
        self._busy[index] = worker
        worker.begin(index, job)

    def receive(self, advance: Advance) -> tuple[int, Answer]:
        """The next answer; UserError (exit code 4) when a process was killed."""
        if self._here:
            index, job = self._here.pop()
            try:
                return index, job.do(self._encoder, advance)
            except UserError as error:
                return index, error
        while True:
            try:
                worker, said = self._heard.get(timeout=_SILENCE)
            except Empty:
                self._require_running()
                continue
            if self._busy.get(worker.index) is not worker:  # the last words of one that was stopped
                continue
            if said is None:
                raise worker.died()
            if "tokens" in said:
                advance(said["tokens"], said["bytes"])
                continue
            if "fault" in said:
                raise RuntimeError(f"A worker failed.\n\n{said['fault']}")
            self._idle.append(self._busy.pop(worker.index))
            return worker.index, error_from_json(said["error"]) if "error" in said else said["metadata"]

    def _require_running(self) -> None:
        """Silence may be a slow source; UserError (exit code 4) when a process is kept from going on."""
        for worker in self._busy.values():
            if worker.is_stopped:
                raise worker.gone("is stopped", "it was sent SIGSTOP", "run it again, it goes on from there")

    def stop(self) -> None:
        """End the jobs under way: what they were to make is no longer wanted."""
        self._here.clear()
        while self._busy:
            self._busy.popitem()[1].end()


class _Worker:
    """One process, and a thread that listens to it."""

    def __init__(
        self, encoder: TextEncoder, heard: "Callable[[tuple[_Worker, dict[str, Any] | None]], None]"
    ) -> None:
        self.index = -1
        self.job: Job | None = None
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)  # noqa: PTH100 -- "" is here
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "data_handler.piece_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ
            | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "PYTHONPATH": path},
            process_group=0,  # Ctrl-C reaches the parent alone, which ends this one
        )
        self._say({"directory": str(encoder.directory.absolute()), "fast": encoder.is_fast})
        threading.Thread(target=self._listen, args=(heard,), daemon=True).start()

    def begin(self, index: int, job: Job) -> None:
        """Send a job."""
        self.index, self.job = index, job
        self._say(job.to_json())

    def end(self) -> None:
        """Kill it: a piece is whole or not at all, so there is nothing to wait for."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    @property
    def is_stopped(self) -> bool:
        """Whether somebody stopped the process, and nobody let it go on."""
        left_as_it_is = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, left_as_it_is) is not None

    def died(self) -> UserError:
        """The error for a process that ended by itself."""
        code = self._process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return self.gone(
            "ended", how, "run it again, it goes on from there; with fewer workers if memory ran out"
        )

    def gone(self, what: str, how: str, fix: str) -> UserError:
        """The error for a process that no answer will come from."""
        assert self.job is not None
        subject = f"{self.job.name}: the process that was preparing {self.job.piece.address}"
        return UserError(f"{subject} {what}", how, fix, ExitCode.BAD_DATA)

    def _say(self, line: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(line).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; the listening thread says so

    def _listen(self, heard: "Callable[[tuple[_Worker, dict[str, Any] | None]], None]") -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            heard((self, json.loads(line)))
        heard((self, None))
