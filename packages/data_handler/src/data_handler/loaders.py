"""Batches of a mixture for one rank: which samples they hold is arithmetic, so resuming is a seek.

With R ranks and micro-batches of m samples, micro-batch i of rank r holds m samples from `(i·R + r)·m` on,
counted from where the loader was sought to:

    sample      0 … m-1 │ m … 2m-1 │ 2m … 3m-1 │ 3m …
    rank        0       │ 1        │ 0         │ 1        (R = 2)
    micro-batch 0       │ 0        │ 1         │ 1

An optimizer step of any number of micro-batches thus sees the same run of samples at any world size. Sample n
of the mixture is sample i of its source (`mixture.py`), which is block `i % N` of epoch `i // N` in an order
that seed, source and epoch permute. The state is the next sample and the history of weights.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_handler.mixture import MixtureSchedule
from data_handler.packing import pack_blocks
from data_handler.permutation import key_of, permuted
from data_handler.shards import Shards
from data_handler.types import Batch
from data_handler.workers import Request, WorkerPool
from durable import ExitCode, UserError

logger = logging.getLogger(__name__)


class TrainingLoader:
    """Iterate to get this rank's micro-batches, from the current sample to `num_samples`.

    Sources of weight 0 are not opened. `reweight` and `seek` hold for an iteration under way, too: what was
    prefetched is dropped. Use as a context manager, or `close`, when there are worker processes.
    """

    def __init__(
        self,
        directories: Mapping[str, str | os.PathLike[str]],
        schedule: MixtureSchedule,
        *,
        block_size: int,
        batch_size: int,
        num_samples: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool | None = None,
    ) -> None:
        if not 0 <= rank < world_size or min(block_size, batch_size) < 1 or num_workers < 0:
            raise ValueError("A rank is below world_size; block_size and batch_size are 1 or more.")
        if missing := [name for name in schedule.names if name not in directories]:
            raise ValueError(f"No directory for source {missing[0]!r}.")
        self.schedule = schedule
        self.block_size = block_size
        self.batch_size = batch_size
        self.num_samples = num_samples
        self.rank, self.world_size, self.num_workers = rank, world_size, num_workers
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._directories = [Path(directories[name]) for name in schedule.names]
        self._shards: dict[int, Shards] = {}
        self._epochs: dict[int, int] = {}
        self._windows: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._pool: WorkerPool | None = None
        self._jumps = 0
        self._open_sources()
        self.seek(0)

    def __iter__(self) -> Iterator[Batch]:
        ahead, jumps = self.next_sample, self._jumps
        while self.next_sample < self.num_samples:
            if jumps != self._jumps:  # sought or reweighted: what was asked for is not what comes next
                ahead, jumps = self.next_sample, self._jumps
                if self._pool is not None:
                    self._pool.discard()
            if self.num_workers == 0:
                request = self._request(self.next_sample)
                batch = pack_blocks(
                    self._shards,
                    source_id=request.source_id,
                    starts=request.starts,
                    sample_id=request.sample_id,
                    block_size=self.block_size,
                )
            else:
                ahead, batch = self._from_workers(ahead)
            self.next_sample += self._stride
            yield batch.pin_memory() if self.pin_memory else batch

    def __len__(self) -> int:
        """Micro-batches that are left for this rank."""
        return max(0, self.num_samples - self.next_sample) // self._stride

    def __enter__(self) -> "TrainingLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
            self._jumps += 1

    def seek(self, sample: int) -> None:
        """Go on from this global sample: the same on every rank, and at the end of an optimizer step."""
        if sample < 0 or (self.num_samples - sample) % self._stride:
            raise UserError(
                "data.batch_size: samples do not divide into micro-batches of all ranks",
                f"{self.num_samples - sample} samples left, {self.world_size} ranks of {self.batch_size}",
                f"make the number of samples a multiple of {self._stride}",
            )
        self.next_sample = sample
        self._jumps += 1

    def reweight(self, weights: Mapping[str, float]) -> int:
        """New weights from the next window on; returns its first sample. Call it alike on every rank."""
        start = self.schedule.reweight(max(0, self.next_sample - 1), weights)
        self._open_sources()
        self._windows.clear()
        self._jumps += 1
        return start

    def epochs(self) -> dict[str, int]:
        """How often each source has been read to its end by `next_sample`."""
        counts = self.schedule.counts(self.next_sample)
        return {
            name: counts[name] // self._num_blocks(source)
            for source, name in enumerate(self.schedule.names)
            if source in self._shards
        }

    def state_dict(self) -> dict[str, Any]:
        """What json keeps: the next sample and the schedule's own state."""
        return {"next_sample": self.next_sample, "block_size": self.block_size} | self.schedule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; UserError when it belongs to another order."""
        if state.get("block_size") != self.block_size:
            found, fix = self.block_size, "use that, or start another run"
            raise UserError(f"data.block_size: the run to resume had {state.get('block_size')}", found, fix)
        if type(state.get("next_sample")) is not int:
            raise UserError(
                "data state: has no next sample", fix="use another checkpoint", exit_code=ExitCode.BAD_DATA
            )
        self.schedule.load_state_dict(state)
        self._open_sources()
        self._windows.clear()
        self.seek(state["next_sample"])

    @property
    def _stride(self) -> int:
        """Samples of one micro-batch on all ranks."""
        return self.world_size * self.batch_size

    def _from_workers(self, ahead: int) -> tuple[int, Batch]:
        """The batch at `next_sample`, after asking for those that follow it, up to `ahead`."""
        if self._pool is None:
            self._pool = WorkerPool(
                dict(zip(self.schedule.names, self._directories, strict=True)),
                num_workers=self.num_workers,
                batch_size=self.batch_size,
                block_size=self.block_size,
            )
        while ahead < self.num_samples and self._pool.num_waiting < self._pool.capacity:
            self._pool.send(self._request(ahead))
            ahead += self._stride
        return ahead, self._pool.receive()

    def _request(self, first: int) -> Request:
        """The micro-batch of this rank among the `_stride` samples from `first` on."""
        sample_id = np.arange(first + self.rank * self.batch_size, first + (self.rank + 1) * self.batch_size)
        window_samples = self.schedule.window_samples
        windows = range(int(sample_id[0]) // window_samples, int(sample_id[-1]) // window_samples + 1)
        sources, starts = zip(*(self._window(number) for number in windows), strict=True)
        places = sample_id - windows[0] * window_samples
        return Request(np.concatenate(sources)[places], np.concatenate(starts)[places], sample_id)

    def _window(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sources and first tokens of a window's samples; the last few windows are kept."""
        if number not in self._windows:
            while len(self._windows) > 3:
                del self._windows[next(iter(self._windows))]
            source, index = self.schedule.window(number)
            starts = np.empty_like(index)
            for place in np.unique(source).tolist():
                mine = source == place
                starts[mine] = self._blocks(place, index[mine]) * self.block_size
            self._windows[number] = source, starts
        return self._windows[number]

    def _blocks(self, source: int, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which block each of these samples of a source is."""
        num_blocks, name = self._num_blocks(source), self.schedule.names[source]
        epochs, blocks = index // num_blocks, index % num_blocks
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            key = key_of("blocks", self.schedule.seed, name, epoch)
            blocks[mine] = permuted(blocks[mine], num_blocks, key)
            if epoch > self._epochs.get(source, 0):
                self._epochs[source] = epoch
                logger.info("Source %s ended: epoch %d begins, in another order.", name, epoch + 1)
        return blocks

    def _num_blocks(self, source: int) -> int:
        return self._shards[source].num_tokens // self.block_size

    def _open_sources(self) -> None:
        """Map every source that has a weight anywhere in the history, and see that they fit together."""
        state = self.schedule.state_dict()["history"]
        for source, name in enumerate(self.schedule.names):
            if source in self._shards or not any(weights[name] for _, weights in state):
                continue
            shards = Shards.open(self._directories[source])
            if shards.num_tokens < self.block_size:
                raise UserError(
                    f"data.sources.{name}: has less than one block of {self.block_size} tokens",
                    f"{shards.num_tokens:,} tokens in {shards.directory}",
                    "prepare more of it, set its weight to 0, or use shorter blocks",
                    ExitCode.BAD_DATA,
                )
            self._require_one_tokenizer(name, shards)
            self._shards[source] = shards

    def _require_one_tokenizer(self, name: str, shards: Shards) -> None:
        for other in self._shards.values():
            ours, theirs = shards.header.tokenizer_fingerprint, other.header.tokenizer_fingerprint
            if ours != theirs:
                raise UserError(
                    f"data.sources.{name}: was prepared with another tokenizer than {other.directory}",
                    f"{ours[:12]}, not {theirs[:12]}",
                    "prepare all sources with one tokenizer",
                    ExitCode.BAD_DATA,
                )
