"""The mixture of a phase: when a step begins whose phase has another data config, its weights count.

From the next window on, as any new weights. Where the run is, and which weights counted when, is in the
loader's state; so this looks at the step alone.
"""

import pytorch_lightning as pl

from data_handler import TrainingLoader
from wrinklefree.lightning.callbacks.influence import InfluenceTrackerCallback
from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.objectives.curriculum import CurriculumScheduler
from wrinklefree.training.data import PreparedData
from wrinklefree.training.metrics import MetricsWriter


class PhaseDataCallback(pl.Callback):
    """There is nothing to restore."""

    def __init__(
        self,
        curriculum: CurriculumScheduler,
        data: PreparedData,
        loader: TrainingLoader,
        influence: InfluenceTrackerCallback | None,
        writer: MetricsWriter | None,
    ) -> None:
        self.curriculum = curriculum
        self.data = data
        self.loader = loader
        self.influence = influence
        self.writer = writer

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, WrinkleFreeLightningModule)
        step = pl_module.progress.step + 1
        # The run begins with what its first phase reads.
        before, now = (
            self.curriculum.data_config(each) or self.data.name for each in (max(1, step - 1), step)
        )
        if before == now:
            return
        weights = self.data.weights_of[now]
        first = self.loader.reweight(weights)
        if self.influence is not None:
            self.influence.begin_with(weights)
        if self.writer is not None:
            row = {"event": "data_phase", "step": step, "data": now, "from_sample": first}
            self.writer.write("event", row)
