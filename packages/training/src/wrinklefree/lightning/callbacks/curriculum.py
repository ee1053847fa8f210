"""Sets the weights of the objectives before each step, and lets a teacher go whom no later step asks."""

import pytorch_lightning as pl

from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.objectives.curriculum import CurriculumScheduler
from wrinklefree.training.metrics import MetricsWriter


class CurriculumCallback(pl.Callback):
    """From the step alone: there is nothing to restore."""

    def __init__(self, curriculum: CurriculumScheduler, writer: MetricsWriter | None) -> None:
        self.curriculum = curriculum
        self.writer = writer

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, WrinkleFreeLightningModule)
        step, manager = pl_module.progress.step + 1, pl_module.objective_manager
        manager.set_weights(self.curriculum.weights(step))
        if pl_module.teacher is None or manager.needs(self.curriculum.coming(step)).teacher:
            return
        pl_module.release_teacher()
        if self.writer is not None:
            self.writer.write("event", {"event": "teacher_freed", "step": step})
