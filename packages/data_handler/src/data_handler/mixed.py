"""A mixture in one's hands: its weights, what was drawn so far, and its documents without preparing them.

`create_pretraining_dataloader` gives one beside the loader that reads the prepared sources, and new weights
go through it to that loader and its workers. By itself it is a stream of documents, to look at or to pack in
memory: sample n comes from the source that the schedule says, which gives its next document; a source that
ends begins again. Rank r of R keeps the samples n with n % R = r, so ranks share the stream and none sees
another's documents. Every rank reads them all: what is large is better prepared.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import IterableDataset, get_worker_info

from data_handler.config import (
    DataConfig,
    SourceConfig,
    SourceFormat,
    empty_source,
    load_data_config,
    require_sound,
)
from data_handler.encoder import TextEncoder, load_encoder
from data_handler.loaders import TrainingLoader
from data_handler.mixture import MixtureSchedule
from data_handler.pieces import read_documents
from data_handler.sources import plan_source
from durable import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetMixture:
    """One source and its share, in few words; `SourceConfig` has all of them."""

    name: str
    path: str
    weight: float = 1.0
    format: SourceFormat = SourceFormat.AUTO
    subset: str | None = None
    split: str = "train"
    text_column: str | tuple[str, ...] | list[str] = "text"
    """All of several columns must be there."""
    text_separator: str = "\n\n"

    def source(self) -> SourceConfig:
        """The same, as configs have it."""
        columns = (self.text_column,) if isinstance(self.text_column, str) else tuple(self.text_column)
        return SourceConfig(
            path=self.path,
            format=self.format,
            subset=self.subset,
            split=self.split,
            text_fields=columns,
            text_separator=self.text_separator,
            weight=self.weight,
        )


class MixedDataset(IterableDataset[dict[str, str]]):
    """Documents of a mixture as {"text", "source"}, without end; weights can change while it is read."""

    def __init__(
        self,
        mixtures: DataConfig | Sequence[DatasetMixture],
        seed: int = 42,
        *,
        rank: int = 0,
        world_size: int = 1,
        window_samples: int = 1024,
        tokenizer: str | Path = "demo",
    ) -> None:
        """`tokenizer` has the template that sources of chat messages are rendered with."""
        if not 0 <= rank < world_size:
            raise ValueError(f"A rank is below world_size, got {rank} of {world_size}.")
        self.config = mixtures if isinstance(mixtures, DataConfig) else mixture_config(mixtures)
        weights = {name: source.weight for name, source in self.config.sources.items()}
        self.schedule = MixtureSchedule(weights, seed, window_samples)
        self.rank, self.world_size = rank, world_size
        self.tokenizer = tokenizer
        self.loader: TrainingLoader | None = None
        """What reads this mixture from prepared sources, if anything does."""
        self._next_sample = 0

    @property
    def next_sample(self) -> int:
        """The global sample that comes next, on the first rank."""
        if self.loader is not None:
            return self.loader.next_sample
        return -(-self._next_sample // self.world_size) * self.world_size

    def get_current_weights(self) -> dict[str, float]:
        """The shares in force at the next sample."""
        return self.schedule.weights(self.next_sample)

    def get_sampling_stats(self) -> dict[str, int]:
        """Samples drawn from each source so far, on all ranks together."""
        return self.schedule.counts(self.next_sample)

    def update_weights_from_influence(self, weights: Mapping[str, float]) -> int:
        """New weights from the next window on, whose first sample it returns; call it alike on every rank.

        A source that is not named keeps its share until all of them are brought to a sum of 1.
        """
        unknown = [name for name in weights if name not in self.schedule.names]
        if unknown:
            raise UserError("data.weights: no such source", unknown[0], choices=self.schedule.names)
        merged = self.get_current_weights() | dict(weights)
        total = sum(merged.values())
        if total > 0:
            merged = {name: weight / total for name, weight in merged.items()}
        if self.loader is not None:
            return self.loader.reweight(merged)
        return self.schedule.reweight(max(0, self.next_sample - 1), merged)

    def __iter__(self) -> Iterator[dict[str, str]]:
        if get_worker_info() is not None:
            # Each would have its own copy: the same documents again, and never the new weights.
            raise ValueError(
                "A MixedDataset is read in the main process; "
                "create_dataloader(num_workers=…) has workers that follow it."
            )
        self._next_sample = 0
        readers: dict[str, Iterator[str]] = {}
        while True:
            window, place = divmod(self._next_sample, self.schedule.window_samples)
            names = [self.schedule.names[source] for source in self.schedule.window(window)[0][place:]]
            for name in names:
                if name not in readers:
                    readers[name] = self._documents(name)
                text, mine = next(readers[name]), self._next_sample % self.world_size == self.rank
                self._next_sample += 1
                if mine:
                    yield {"text": text, "source": name}

    def _documents(self, name: str) -> Iterator[str]:
        """The texts of a source, again and again."""
        source = self.config.sources[name]
        # Texts need no tokenizer, chat messages need its template.
        encoder = load_encoder(self.tokenizer if source.messages_field is not None else "demo")
        while True:
            empty = True
            for text in self._one_pass(name, source, encoder):
                empty = False
                yield text
            if empty:
                raise empty_source(name, source.path)
            logger.info("Source %s ended: it begins again.", name)

    def _one_pass(self, name: str, source: SourceConfig, encoder: TextEncoder) -> Iterable[str]:
        for piece in plan_source(name, source, self.config).pieces:
            limit = self.config.max_line_bytes
            for document in read_documents(name, source, piece, encoder, max_line_bytes=limit):
                yield document.text


def mixture_config(mixtures: Sequence[DatasetMixture]) -> DataConfig:
    """A config of these sources, checked like one from YAML."""
    names = [mixture.name for mixture in mixtures]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError("data.sources: two sources have one name", repeated[0], "rename one")
    config = DataConfig(name="mixture", sources={mixture.name: mixture.source() for mixture in mixtures})
    require_sound(config, "data")
    return config


def create_mixed_dataset(
    config: DataConfig | str | Path | Sequence[DatasetMixture],
    *,
    seed: int = 42,
    rank: int = 0,
    world_size: int = 1,
    tokenizer: str | Path = "demo",
) -> MixedDataset:
    """The documents of a config (itself, its name or its path), or of sources that are listed."""
    mixtures = load_data_config(config) if isinstance(config, str | Path) else config
    return MixedDataset(mixtures, seed, rank=rank, world_size=world_size, tokenizer=tokenizer)
