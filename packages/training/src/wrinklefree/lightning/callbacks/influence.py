"""Mixture weights that follow influence: once per optimizer step the tracker is asked, at some it acts."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn

from data_handler import TrainingLoader
from data_handler.influence.config import InfluenceConfig, MixtureOptimizationConfig, TrackerConfig
from data_handler.influence.scoring import score_sources
from data_handler.influence.tracker import InfluenceTracker
from data_handler.probes import Probe
from data_handler.shards import Shards
from durable import UserError
from wrinklefree.config.schema import InfluenceRunConfig
from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.training.compiling import without_compiled_blocks
from wrinklefree.training.data import PreparedData
from wrinklefree.training.metrics import MetricsWriter


class InfluenceTrackerCallback(pl.Callback):
    """Wraps `data_handler.influence.InfluenceTracker`, whose state goes into every checkpoint."""

    def __init__(
        self,
        config: InfluenceRunConfig,
        model: nn.Module,
        loader: TrainingLoader,
        data: PreparedData,
        *,
        seed: int,
        writer: MetricsWriter | None,
    ) -> None:
        self.config = config
        self.model = model
        self.loader = loader
        self.writer = writer
        self.seed = seed
        self._sources = {name: Shards.open(path) for name, path in data.train_dirs().items()}
        self._probes: Mapping[str, Probe] = data.probes()
        if not self._probes:
            raise UserError(
                "training.influence: no source of this data config holds out a probe",
                data.name,
                "give a source probe_one_in, or switch training.influence.enabled off",
            )
        self.begin_with(data.weights)

    def begin_with(self, weights: Mapping[str, float]) -> None:
        """Move these weights from now on, from where they stand; a source of weight 0 stays closed."""
        config = self.config
        self.base = {name: weight for name, weight in weights.items() if weight > 0}
        self.tracker = InfluenceTracker(
            TrackerConfig(
                enabled=config.enabled,
                update_interval=config.update_interval,
                warmup_steps=config.warmup_steps,
                learning_rate=config.learning_rate,
                mixture=MixtureOptimizationConfig(
                    min_weight=config.min_weight, max_weight=config.max_weight, noise=config.noise
                ),
            ),
            self.base,
            self._scores,
            self,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"base": self.base, **self.tracker.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin_with(state["base"])
        self.tracker.load_state_dict(state)

    def reweight(self, sample: int, weights: dict[str, float]) -> object:
        """New weights from the next window on; what was read ahead beyond it is dropped."""
        return self.loader.reweight(dict.fromkeys(self._sources, 0.0) | weights)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, WrinkleFreeLightningModule)
        update = self.tracker.on_step_end(pl_module.progress.step, self.loader.next_sample)
        if update is not None and self.writer is not None:
            self.writer.write(
                "event", {"event": "influence", "step": pl_module.progress.step, **update.to_dict()}
            )

    def _scores(self) -> dict[str, Tensor]:
        was_training = self.model.training
        self.model.eval()
        try:
            with without_compiled_blocks(self.model):
                return score_sources(
                    self.model,
                    {name: self._sources[name] for name in self.base},
                    self._probes,
                    num_samples=self.config.num_samples,
                    block_size=self.loader.block_size,
                    config=InfluenceConfig(seed=self.seed),
                )
        finally:
            self.model.train(was_training)
