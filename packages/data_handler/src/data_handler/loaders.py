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
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_handler.mixture import MixtureSchedule
from data_handler.packing import batch_of, read_blocks, token_memory
from data_handler.permutation import key_of, permuted
from data_handler.shards import Shards
from data_handler.types import Batch
from data_handler.workers import Request, WorkerPool
from durable import ExitCode, UserError

logger = logging.getLogger(__name__)

# A call to numpy costs as much as thousands of tokens, so each kind of work is done for as many as it can be.
SAMPLES_PLANNED = 2**12
"""Micro-batches up to this size are planned together."""
TOKENS_READ = 2**20
"""Those up to this size are read together."""
TOKENS_WRITTEN = 2**16
"""Those up to this size are written together, in memory that they share: 2 MB."""


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
        self._pool: WorkerPool | None = None
        self._jumps = 0
        self._open_sources()
        self.seek(0)

    def __iter__(self) -> Iterator[Batch]:
        while self.next_sample < self.num_samples:
            jumps, stride = self._jumps, self._stride
            for batch in self._read_local() if self.num_workers == 0 else self._read_by_workers():
                self.next_sample += stride
                yield batch.pin_memory() if self.pin_memory else batch
                if jumps != self._jumps:  # sought or reweighted: what was read ahead is not what comes next
                    break

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
        self.seek(state["next_sample"])

    @property
    def _stride(self) -> int:
        """Samples of one micro-batch on all ranks."""
        return self.world_size * self.batch_size

    def _read_local(self) -> Iterator[Batch]:
        """All micro-batches from `next_sample` on."""
        at_once, step = self._samples_of(TOKENS_READ), self._samples_of(TOKENS_WRITTEN)
        memory = token_memory(list(self._shards.values()), at_once, self.block_size)
        for request in self._plans(at_once):
            blocks = read_blocks(
                self._shards,
                source_id=request.source_id,
                starts=request.starts,
                block_size=self.block_size,
                memory=memory,
            )
            for first in range(0, len(request.sample_id), step):
                rows = slice(first, min(first + step, len(request.sample_id)))
                packed = np.empty((4, rows.stop - first, self.block_size), np.int64)
                blocks.write(rows, packed)
                # As many views in one call: each by itself would cost more than writing it.
                cut = (-1, self.batch_size)
                yield from map(
                    batch_of,
                    torch.from_numpy(packed).unflatten(1, cut).unbind(1),
                    torch.from_numpy(request.source_id[rows]).view(cut).unbind(),
                    torch.from_numpy(request.sample_id[rows]).view(cut).unbind(),
                )

    def _samples_of(self, num_tokens: int) -> int:
        """As many samples as have so many tokens, in whole micro-batches."""
        return max(1, num_tokens // (self.batch_size * self.block_size)) * self.batch_size

    def _read_by_workers(self) -> Iterator[Batch]:
        """All micro-batches from `next_sample` on; each worker has the next ones under way meanwhile."""
        if self._pool is None:
            self._pool = WorkerPool(
                dict(zip(self.schedule.names, self._directories, strict=True)),
                num_workers=self.num_workers,
                batch_size=self.batch_size,
                block_size=self.block_size,
            )
        self._pool.discard()
        requests = self._plans(self.batch_size)
        while True:
            for request in islice(requests, self._pool.capacity - self._pool.num_waiting):
                self._pool.send(request)
            if not self._pool.num_waiting:
                return
            yield self._pool.receive()

    def _plans(self, num_samples: int) -> Iterator[Request]:
        """What is left for this rank, in requests of up to so many samples."""
        for first in range(self.next_sample, self.num_samples, self._stride * self._planned):
            yield from self._plan(first).split(num_samples)

    @property
    def _planned(self) -> int:
        """Micro-batches that are planned together."""
        return max(1, SAMPLES_PLANNED // self.batch_size)

    def _plan(self, first: int) -> Request:
        """This rank's micro-batches from global sample `first` on, as many as are read together."""
        left = (self.num_samples - first) // self._stride
        begins = first + self.rank * self.batch_size + self._stride * np.arange(min(left, self._planned))
        sample_id = (begins[:, None] + np.arange(self.batch_size)).reshape(-1)
        windows, places = np.divmod(sample_id, self.schedule.window_samples)
        located = [
            self.schedule.window(number, places[windows == number]) for number in np.unique(windows).tolist()
        ]
        source_id, index = (np.concatenate(column) for column in zip(*located, strict=True))
        for source in np.unique(source_id).tolist():
            mine = source_id == source
            index[mine] = self._blocks(source, index[mine])
        return Request(source_id, index * self.block_size, sample_id)

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
            if ours != theirs or shards.header.vocab_size != other.header.vocab_size:
                raise UserError(
                    f"data.sources.{name}: was prepared with another tokenizer than {other.directory}",
                    f"{ours[:12]}, not {theirs[:12]}",
                    "prepare all sources with one tokenizer",
                    ExitCode.BAD_DATA,
                )
