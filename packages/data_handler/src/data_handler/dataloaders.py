"""From the name of a config to batches: what is missing is prepared, then mixed, packed and loaded.

    config ─► prepare (rank 0; the others wait) ─► TrainingLoader over MixedDataset's schedule
                                               └─► DomainProbeDataset for each domain

Probes are what `prepare` held out by content, so none of their documents is in a training block.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed
from torch.utils.data import IterableDataset

from data_handler.config import DataConfig, load_data_config
from data_handler.loaders import TrainingLoader
from data_handler.mixed import DatasetMixture, MixedDataset, mixture_config
from data_handler.prepare import prepare
from data_handler.probes import Probe
from data_handler.shards import Shards
from data_handler.types import Batch
from durable import ExitCode, UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainProbeConfig:
    """Which held-out documents, and how many blocks of them."""

    path: Path
    """The `probe` directory of a prepared source."""
    samples: int | None = None
    """Blocks; all that there are by default."""


class DomainProbeDataset(IterableDataset[Batch]):
    """The probe of one domain as batches, the same each time it is iterated."""

    def __init__(self, config: DomainProbeConfig, *, batch_size: int = 4, max_length: int = 2048) -> None:
        self.probe = Probe(config.path)
        self.domain = self.probe.domain
        self.batch_size, self.max_length = batch_size, max_length
        available = self.probe.shards.num_tokens // max_length
        self.samples = available if config.samples is None else config.samples
        if not 0 < self.samples <= available:
            raise UserError(
                f"{config.path}: has {available} blocks of {max_length} tokens",
                f"{config.samples or 'at least 1'} wanted",
                "hold out more documents, or ask for fewer or shorter blocks",
                ExitCode.BAD_DATA,
            )

    def __iter__(self) -> Iterator[Batch]:
        return self.probe.batches(
            block_size=self.max_length, batch_size=self.batch_size, num_samples=self.samples
        )

    def __len__(self) -> int:
        """Batches."""
        return -(-self.samples // self.batch_size)


def create_pretraining_dataloader(
    tokenizer: str | Path,
    batch_size: int,
    max_length: int = 2048,
    config_name: DataConfig | str | Path = "mixed_pretrain",
    with_probes: bool = True,
    *,
    data_dir: Path | None = None,
    num_samples: int | None = None,
    probe_samples: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int | None = None,
    seed: int = 42,
    window_samples: int = 1024,
) -> tuple[TrainingLoader, MixedDataset, dict[str, DomainProbeDataset]]:
    """The loader of a config, its mixture, and its probes by domain (none without `with_probes`).

    What is not in `data_dir` (data/NAME) is prepared there. `num_samples` are those of all ranks; by default
    as many as there are blocks. `num_workers` is DATA_NUM_WORKERS, or 0, when it is not given.
    """
    config = config_name if isinstance(config_name, DataConfig) else load_data_config(config_name)
    directory = data_dir or Path("data") / config.name
    prepare_once(config, directory, tokenizer, rank=rank)
    mixed = MixedDataset(
        config,
        seed,
        rank=rank,
        world_size=world_size,
        window_samples=window_samples,
        tokenizer=tokenizer,
    )
    mixed.loader = TrainingLoader(
        {name: directory / name / "train" for name in config.sources},
        mixed.schedule,
        block_size=max_length,
        batch_size=batch_size,
        num_samples=_one_pass(config, directory, max_length, world_size * batch_size)
        if num_samples is None
        else num_samples,
        rank=rank,
        world_size=world_size,
        num_workers=_num_workers(num_workers),
    )
    if not with_probes:
        return mixed.loader, mixed, {}
    probes = create_domain_probe_loaders(
        config, directory, batch_size=batch_size, max_length=max_length, samples=probe_samples
    )
    return mixed.loader, mixed, probes


def create_dataloader(
    config: DataConfig | str | Path,
    tokenizer: str | Path,
    batch_size: int,
    max_length: int = 2048,
    **settings: Any,
) -> TrainingLoader:
    """The loader alone; `settings` are those of `create_pretraining_dataloader`."""
    loader, _, _ = create_pretraining_dataloader(
        tokenizer, batch_size, max_length, config, with_probes=False, **settings
    )
    return loader


def create_mixed_dataloader(
    mixtures: Sequence[DatasetMixture],
    tokenizer: str | Path,
    batch_size: int,
    max_length: int = 2048,
    **settings: Any,
) -> tuple[TrainingLoader, MixedDataset]:
    """The loader of sources that are listed, and their mixture."""
    loader, mixed, _ = create_pretraining_dataloader(
        tokenizer, batch_size, max_length, mixture_config(mixtures), with_probes=False, **settings
    )
    return loader, mixed


def create_domain_probe_loaders(
    config: DataConfig | str | Path,
    data_dir: Path,
    *,
    batch_size: int = 4,
    max_length: int = 2048,
    samples: int | None = None,
) -> dict[str, DomainProbeDataset]:
    """Domain → its probe, for the prepared sources that hold one out; several of a domain: DOMAIN/SOURCE."""
    config = config if isinstance(config, DataConfig) else load_data_config(config)
    held = {name: config.sources[name] for name in config.weights if config.sources[name].probe_one_in}
    domains = [source.domain for source in held.values()]
    loaders = {}
    for name, source in held.items():
        key = source.domain if domains.count(source.domain) == 1 else f"{source.domain}/{name}"
        probe = DomainProbeConfig(path=data_dir / name / "probe", samples=samples)
        loaders[key] = DomainProbeDataset(probe, batch_size=batch_size, max_length=max_length)
    return loaders


def prepare_once(config: DataConfig, directory: Path, tokenizer: str | Path, *, rank: int = 0) -> None:
    """Prepare on rank 0 while the others wait; what fails there is raised on every rank."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    failed: list[UserError | None] = [None]
    if rank == 0 or not together:
        try:
            prepare(config, directory, tokenizer=tokenizer)
        except UserError as error:
            failed = [error]
    if together:
        torch.distributed.broadcast_object_list(failed, src=0)
    if failed[0] is not None:
        raise failed[0]


def _one_pass(config: DataConfig, directory: Path, block_size: int, stride: int) -> int:
    """Blocks of all sources together, rounded down to whole micro-batches of all ranks."""
    blocks = {
        name: Shards.open(directory / name / "train").num_tokens // block_size for name in config.weights
    }
    if sum(blocks.values()) < stride:
        raise UserError(
            f"{directory}: has {sum(blocks.values())} blocks of {block_size} tokens",
            f"{stride} in a batch of all ranks",
            "prepare more, or use shorter blocks or smaller batches",
            ExitCode.BAD_DATA,
        )
    return sum(blocks.values()) // stride * stride


def _num_workers(given: int | None) -> int:
    found = os.environ.get("DATA_NUM_WORKERS", "0") if given is None else str(given)
    if not found.isdecimal():
        raise UserError("DATA_NUM_WORKERS: must be a number of 0 or more", found)
    return int(found)
