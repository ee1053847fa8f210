"""The processes that train one model together; torchrun starts them and tells each who it is."""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from durable import ExitCode, UserError
from wrinklefree.config.schema import DistributedConfig, Strategy
from wrinklefree.training.neighbours import Neighbours

Value = TypeVar("Value")
DONE = b"done"


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of how many this process is."""

    rank: int = 0
    world_size: int = 1
    _turns: Iterator[int] = field(default_factory=itertools.count)
    """Counts what was looked for; equal on all ranks, which call alike."""

    @property
    def is_first(self) -> bool:
        """Rank 0 prepares, writes and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def found_by_first(self, find: Callable[[], Value]) -> Value:
        """What rank 0 finds, on all ranks, however long it takes.

        A collective alone would give up after `distributed.timeout_seconds`.
        """
        if self.world_size == 1:
            return find()
        store: Any = dist.distributed_c10d._get_default_store()
        key = f"wrinklefree/found/{next(self._turns)}"
        if self.is_first:
            with _told(store, key):
                found = find()
            return self.shared(found)
        while not store.check([key]):
            time.sleep(0.2)
        if store.get(key) != DONE:
            raise UserError(
                "distributed: rank 0 ended before all could begin",
                fix="look at its error",
                exit_code=ExitCode.DISTRIBUTED,
            )
        nothing: Any = None
        received: Value = self.shared(nothing)
        return received

    def first_then_all(self, prepare: Callable[[], Value]) -> Value:
        """Rank 0 prepares what lies on disk, then all find it there."""
        prepared = self.found_by_first(prepare)
        return prepared if self.is_first else prepare()

    def shared(self, value: Value) -> Value:
        """Rank 0's value, on all ranks."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]


def num_ranks() -> int:
    """How many torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def _told(store: Any, key: str) -> Iterator[None]:
    """Tell the others how the block ended."""
    try:
        yield
    except BaseException:
        store.set(key, "failed")
        raise
    store.set(key, DONE.decode())


@contextmanager
def joined_ranks(config: DistributedConfig) -> Iterator[Ranks]:
    """Join the others; a rank that dies or hangs ends all of them with exit code 7."""
    world_size, rank = num_ranks(), int(os.environ.get("RANK", "0"))
    if world_size > 1 and config.strategy is Strategy.single:
        raise UserError(
            "distributed: torchrun started several processes for a run of one",
            f"WORLD_SIZE={world_size}, distributed.strategy={config.strategy}",
            "add distributed=ddp, or start it without torchrun",
        )
    if world_size > 1 and config.strategy is Strategy.fsdp:
        raise UserError(
            "distributed: sharded training comes later",
            f"WORLD_SIZE={world_size}, distributed.strategy={config.strategy}",
            "use distributed=ddp",
        )
    if world_size == 1:
        if config.strategy is Strategy.fsdp:
            print("distributed=fsdp_multi: there is one process, so nothing is sharded", flush=True)
        yield Ranks()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # before the first collective
    dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout_seconds))
    neighbours = Neighbours.gathered(rank, world_size)
    try:
        yield Ranks(rank, world_size)
    except (RuntimeError, dist.DistError) as error:
        if not _is_about_ranks(error):
            raise
        raise UserError(
            f"distributed: rank {rank} lost another rank",
            "; ".join([str(error).splitlines()[0], *neighbours.end()]),
            "look for the first error among the ranks; the same command goes on from the last checkpoint",
            ExitCode.DISTRIBUTED,
        ) from error
    finally:
        dist.destroy_process_group()


def _is_about_ranks(error: Exception) -> bool:
    words = ("connection", "timed out", "timeout", "gloo", "nccl", "peer", "socket")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)
