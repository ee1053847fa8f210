"""Processes that read and pack batches ahead of training.

    main      resolves which blocks (schedule, epochs) ──request──► worker w = request % W
    worker    maps the shards, packs, writes into a shared slot ──answer──► main copies the slot out, in order

The order is decided before a request leaves, so workers know nothing of mixtures or weights. Each notes which
source it is about to read in shared memory: when one dies or hangs, its last note names the source.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_handler.packing import batch_of, pack_blocks
from data_handler.shards import Shards
from data_handler.types import Batch
from durable import ExitCode, UserError

PREFETCH = 2
"""Batches that each worker prepares ahead."""
ANSWER_SECONDS = 20
"""Without an answer for so long, a worker that has begun is taken for stopped or hung."""
START_SECONDS = 120
"""The same before it has begun: where processes are spawned, it imports torch first."""

_STARTING, _IDLE = -2, -1
"""What a worker notes instead of a source."""


@dataclass(frozen=True, slots=True)
class Request:
    """Blocks to pack into one batch."""

    source_id: NDArray[np.int64]
    starts: NDArray[np.int64]
    sample_id: NDArray[np.int64]

    def split(self, num_samples: int) -> "list[Request]":
        """Requests for `num_samples` each."""
        return [
            Request(self.source_id[mine], self.starts[mine], self.sample_id[mine])
            for first in range(0, len(self.sample_id), num_samples)
            for mine in [slice(first, first + num_samples)]
        ]


class WorkerPool:
    """`num_workers` processes; answers come back in the order of the requests."""

    def __init__(
        self,
        directories: Mapping[str, Path],
        *,
        num_workers: int,
        batch_size: int,
        block_size: int,
    ) -> None:
        self._names = tuple(directories)
        self._slots = torch.empty(num_workers, PREFETCH, 4, batch_size, block_size, dtype=torch.int64)
        self._slots.share_memory_()
        self._waiting: deque[Request] = deque()
        self._num_sent = self._num_received = 0
        context = multiprocessing.get_context()
        self._workers = [
            _Worker(context, number, self._slots[number], list(directories.values()))
            for number in range(num_workers)
        ]

    @property
    def capacity(self) -> int:
        """Requests that may be under way at once."""
        return len(self._workers) * PREFETCH

    @property
    def num_waiting(self) -> int:
        """Requests under way."""
        return len(self._waiting)

    def send(self, request: Request) -> None:
        """Ask for a batch; `receive` returns it when its turn comes."""
        assert self.num_waiting < self.capacity, "a slot would be overwritten"
        worker, slot = self._place_of(self._num_sent)
        try:
            self._workers[worker].pipe.send((slot, request))
        except OSError:
            raise self._died(worker, request) from None
        self._num_sent += 1
        self._waiting.append(request)

    def receive(self) -> Batch:
        """The next batch; UserError (exit code 4) when a worker is found dead, or gives no answer."""
        worker, slot = self._place_of(self._num_received)
        request = self._waiting[0]
        self._await_answer(worker, request)
        try:
            failure = self._workers[worker].pipe.recv()
        except (EOFError, OSError):
            raise self._died(worker, request) from None
        self._num_received += 1
        self._waiting.popleft()
        if failure is not None:
            raise failure
        per_token = self._slots[worker, slot].clone()
        return batch_of(per_token, torch.from_numpy(request.source_id), torch.from_numpy(request.sample_id))

    def _await_answer(self, number: int, request: Request) -> None:
        ours = self._workers[number]
        everyone = [other.process.sentinel for other in self._workers]
        num_waits = 0
        # Counted in waits, not by the clock: when all of us are stopped and go on later, that is one wait.
        while not ours.pipe.poll():
            self._require_alive(request)
            if num_waits >= (START_SECONDS if ours.noted == _STARTING else ANSWER_SECONDS):
                raise self._hangs(number, request)
            if not multiprocessing.connection.wait([ours.pipe, *everyone], timeout=1.0):
                num_waits += 1
        self._require_alive(request)

    def discard(self) -> None:
        """Wait for what is under way and drop it."""
        while self._waiting:
            self.receive()

    def close(self) -> None:
        """End the processes, stopped ones too; they hold nothing that needs tidying up."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers = []

    def _place_of(self, number: int) -> tuple[int, int]:
        turn, worker = divmod(number, len(self._workers))
        return worker, turn % PREFETCH

    def _require_alive(self, request: Request) -> None:
        for number, worker in enumerate(self._workers):
            if not worker.process.is_alive():
                raise self._died(number, request)

    def _died(self, number: int, request: Request) -> UserError:
        worker = self._workers[number]
        worker.process.join(timeout=1.0)
        code = worker.process.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with code {code}"
        fix = "see whether memory ran out; lower data.num_workers (0 reads in the training process)"
        return self._failed(number, request, "died", how, fix)

    def _hangs(self, number: int, request: Request) -> UserError:
        worker = self._workers[number]
        state = _state_of(worker.process.pid)
        worker.process.kill()  # or our own end would wait for it
        fix = "see whether its files' disk answers, or who stopped it; then resume"
        return self._failed(number, request, "gives no answer", state, fix)

    def _failed(self, number: int, request: Request, what: str, how: str, fix: str) -> UserError:
        """Names what the worker read, or was to read next when it was idle."""
        worker = self._workers[number]
        source, doing = worker.noted, "reading it"
        if source < 0:
            source, doing = int(request.source_id[0]), "about to read it"
        return UserError(
            f"data.sources.{self._names[source]}: the worker {doing} {what}",
            f"process {worker.process.pid} {how}",
            fix,
            ExitCode.BAD_DATA,
        )


def _state_of(process_id: int | None) -> str:
    """What Linux says a process does, as `T (stopped)` or `D (disk sleep)`."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process_id}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("State:"):
                return f"in state {line.removeprefix('State:').strip()}"
    return "is silent"


class _Worker:
    """One process and the main process's ends of what they share."""

    def __init__(self, context: Any, number: int, slots: Tensor, directories: list[Path]) -> None:
        self.pipe, theirs = context.Pipe()
        self.reading = torch.full((1,), _STARTING, dtype=torch.int64)
        self.reading.share_memory_()
        self.process = context.Process(
            target=_work,
            args=(theirs, slots, self.reading, directories, os.getpid()),
            name=f"data-worker-{number}",
            daemon=True,
        )
        self.process.start()
        theirs.close()

    @property
    def noted(self) -> int:
        """The source it reads, or what it does instead."""
        return int(self.reading[0])


def _work(
    pipe: multiprocessing.connection.Connection,
    slots: Tensor,
    reading: Tensor,
    directories: list[Path],
    parent: int,
) -> None:
    """Answer requests until the parent goes; Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    shards: dict[int, Shards] = {}
    reading[0] = _IDLE
    with contextlib.suppress(EOFError, OSError):
        while True:
            # A forked sibling may hold the other end of the pipe open, so its closing alone tells nothing.
            while not pipe.poll(5.0):
                if os.getppid() != parent:
                    return
            slot, request = pipe.recv()
            pipe.send(_answered(request, slots[slot], shards, directories, reading))


def _answered(
    request: Request, slot: Tensor, shards: dict[int, Shards], directories: list[Path], reading: Tensor
) -> UserError | None:
    """Fill the slot; the error to raise in the main process instead, if there is one."""

    def note(source: int) -> None:
        reading[0] = source

    try:
        for source in set(request.source_id.tolist()) - shards.keys():
            note(source)
            shards[source] = Shards.open(directories[source])
        pack_blocks(
            shards,
            source_id=request.source_id,
            starts=request.starts,
            sample_id=request.sample_id,
            block_size=slot.shape[-1],
            reading=note,
            out=slot.numpy(),
        )
    except UserError as error:
        return error
    note(_IDLE)
    return None
