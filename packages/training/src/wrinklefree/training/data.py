"""The mixture that a run reads: prepared when it is not there yet, and opened at the run's own sample."""

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data_handler import MixtureSchedule, TrainingLoader
from data_handler.config import DataConfig, load_data_config
from data_handler.probes import Probe
from data_handler.shards import read_header
from durable import ExitCode, UserError, error_line
from wrinklefree.config.schema import RunConfig
from wrinklefree.objectives import create_curriculum_scheduler
from wrinklefree.training.student import tokenizer_name

logger = logging.getLogger(__name__)
_WAIT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class PreparedConfig:
    """A data config, and where its token shards are, or will be."""

    config: DataConfig
    directory: Path

    def absent(self) -> list[str]:
        """Sources that are still to be prepared."""
        return [
            name for name in self.config.weights if not (self.directory / name / "manifest.json").is_file()
        ]


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Token shards on this disk: all sources that some phase of the run reads."""

    name: str
    """Of the data config that the run begins with."""
    directories: dict[str, Path]
    """Source → its shards and its probe."""
    weights_of: dict[str, dict[str, float]]
    """Data config → weight of every source, 0 for those of others."""

    @property
    def weights(self) -> dict[str, float]:
        """That the run begins with."""
        return self.weights_of[self.name]

    def train_dirs(self) -> dict[str, Path]:
        return {name: directory / "train" for name, directory in self.directories.items()}

    def fingerprints(self) -> dict[str, dict[str, str]]:
        """Source → what its shards were made from."""
        headers = {name: read_header(path) for name, path in self.train_dirs().items()}
        return {
            name: {"documents": header.source_fingerprint, "tokenizer": header.tokenizer_fingerprint}
            for name, header in headers.items()
        }

    def probes(self) -> dict[str, Probe]:
        """Held-out documents of every source that has some."""
        found = {name: directory / "probe" for name, directory in self.directories.items()}
        return {name: Probe(path) for name, path in found.items() if path.is_dir()}


def prepare_data(config: RunConfig) -> PreparedData:
    """Prepare the sources that are not there yet, of the run's data config and of its phases'."""
    directories: dict[str, Path] = {}
    given: dict[str, dict[str, float]] = {}
    for name in data_configs(config):
        prepared = _prepared(config, name)
        own = {}
        for source, weight in prepared.config.weights.items():
            directory = prepared.directory / source
            # Two configs may call different texts the same.
            key = source if directories.get(source, directory) == directory else f"{name}:{source}"
            directories[key], own[key] = directory, weight
        given[name] = own
    weights = {name: dict.fromkeys(directories, 0.0) | own for name, own in given.items()}
    return PreparedData(next(iter(given)), directories, weights)


def data_configs(config: RunConfig) -> list[str]:
    """What the run reads in its phases, that of the first step first; each once."""
    curriculum = create_curriculum_scheduler(config.training.curriculum, config.max_steps)
    if curriculum is None:
        return [config.data.config_name]
    # A phase may be over before the first step.
    first = curriculum.data_config(1) or config.data.config_name
    named = [phase.data_config for phase in curriculum.phases]
    return list(dict.fromkeys([first, *(name for name in named if name)]))


def _prepared(config: RunConfig, name: str) -> PreparedConfig:
    from data_handler.encoder import load_encoder

    data_config = load_data_config(name)
    tokenizer = tokenizer_name(config.model)
    if config.data.directory is not None:
        directory = Path(config.data.directory)
    else:
        directory = shared_directory() / f"{data_config.name}-{load_encoder(tokenizer).fingerprint[:12]}"
    prepared = PreparedConfig(data_config, directory)
    if prepared.absent():
        _prepare(prepared, tokenizer)
    return prepared


def _prepare(wanted: PreparedConfig, tokenizer: str) -> None:
    """Runs share their data: who comes while another prepares it waits for that."""
    from data_handler.prepare import prepare

    is_waiting = False
    while absent := wanted.absent():
        try:
            prepare(wanted.config, wanted.directory, tokenizer=tokenizer)
        except UserError as error:
            if error.exit_code != ExitCode.BUSY:
                raise
            if not is_waiting:
                logger.info("waiting for %s: %s", ", ".join(absent), error_line(error))
            is_waiting = True
            time.sleep(_WAIT_SECONDS)
        else:
            return


def shared_directory() -> Path:
    """Where runs find data that another prepared: $WRINKLEFREE_DATA, else the user's cache."""
    given = os.environ.get("WRINKLEFREE_DATA")
    if given:
        return Path(given)
    return user_cache() / "data"


def user_cache() -> Path:
    """What can be made or copied again, for all runs of this person."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wrinklefree"


def open_loader(
    config: RunConfig,
    data: PreparedData,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_samples: int | None = None,
) -> TrainingLoader:
    """Micro-batches of this rank, from sample 0; none gives `num_samples` of the whole run."""
    training = config.training
    schedule = MixtureSchedule(data.weights, config.seed, config.data.window_samples)
    per_step = training.batch_size * training.gradient_accumulation_steps * world_size
    return TrainingLoader(
        data.train_dirs(),
        schedule,
        block_size=training.max_seq_length,
        batch_size=training.batch_size,
        num_samples=config.max_steps * per_step if num_samples is None else num_samples,
        rank=rank,
        world_size=world_size,
        num_workers=config.data.num_workers,
    )


@dataclass(frozen=True, slots=True)
class CalibrationBatches:
    """Token ids of the first micro-batches of the run, as often as somebody asks."""

    config: RunConfig
    data: PreparedData

    def __iter__(self) -> Iterator[Tensor]:
        training = self.config.training
        wanted = training.auto_convert.calibration_batches * training.batch_size
        with open_loader(self.config, self.data, num_samples=wanted) as loader:
            for batch in loader:
                yield batch.input_ids
