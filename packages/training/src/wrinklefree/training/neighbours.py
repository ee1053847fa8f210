"""The other ranks on this machine, and how to get rid of one that hangs.

A rank that died closes its connections, and the others notice at once. One that is stopped, or waits for a
disk that does not answer, is only noticed when the others have waited for `distributed.timeout_seconds`. It
would then stay, with its memory: it reads no signal that can be handled. So whoever notices says in the
processes' common store that it leaves by itself, and ends those that have not said so.
"""

import os
import select
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist

LEAVING = "wrinklefree/leaving/{rank}"
STOPPED = "was stopped"
PATIENCE_SECONDS = 3.0
"""Ranks that wait for the same one notice within this time of each other."""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """A handle of each other process on this machine, which no other process can come to have."""

    rank: int
    handles: dict[int, int]
    """Rank → pidfd; empty where the system has none."""
    processes: dict[int, int]
    """Rank → process id."""

    @classmethod
    def gathered(cls, rank: int, world_size: int) -> Self:
        """Every rank calls this."""
        places: list[tuple[str, int]] = [("", 0)] * world_size
        dist.all_gather_object(places, (socket.gethostname(), os.getpid()))
        processes = {
            other: process
            for other, (host, process) in enumerate(places)
            if other != rank and host == socket.gethostname()
        }
        has_handles = hasattr(os, "pidfd_open")
        handles = {other: os.pidfd_open(process) for other, process in processes.items() if has_handles}
        return cls(rank, handles, processes)

    def end(self) -> list[str]:
        """End those that do not leave by themselves; what was done, in words."""
        # One that is stopped may be the one that keeps the store.
        done = [self._end(other) for other in self._still_there() if _state(self.processes[other]) == STOPPED]
        store = dist.distributed_c10d._get_default_store()
        try:
            store.set(LEAVING.format(rank=self.rank), "yes")
            deadline = time.monotonic() + PATIENCE_SECONDS
            while (left := self._staying(store)) and time.monotonic() < deadline:
                time.sleep(0.1)
        except (RuntimeError, dist.DistError):  # who kept the store is gone, and the others notice, too
            return done
        return [*done, *(self._end(other) for other in left)]

    def _still_there(self) -> list[int]:
        return [other for other, handle in self.handles.items() if not _has_ended(handle)]

    def _staying(self, store: Any) -> list[int]:
        return [other for other in self._still_there() if not store.check([LEAVING.format(rank=other)])]

    def _end(self, other: int) -> str:
        state = _state(self.processes[other])
        signal.pidfd_send_signal(self.handles[other], signal.SIGKILL)
        return f"rank {other} {state} and was ended"


def _has_ended(handle: int) -> bool:
    return bool(select.select([handle], [], [], 0)[0])


def _state(process: int) -> str:
    try:
        letter = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "did not answer"
    return {"T": STOPPED, "D": "waited for a disk"}.get(letter, "did not answer")
