"""Checkpoints at optimizer-step boundaries: every so many steps, and whenever the run stops."""

import pytorch_lightning as pl

from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.training.checkpoint import Saver
from wrinklefree.training.run_directory import RunDirectory


class CheckpointCallback(pl.Callback):
    """Rank 0 writes, the others wait."""

    def __init__(self, directory: RunDirectory, save: Saver, *, interval: int, keep_last_n: int) -> None:
        self.directory = directory
        self.interval, self.keep_last_n = interval, keep_last_n
        self._save = save
        self.saved_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, WrinkleFreeLightningModule)
        # Lightning has put its own handlers in front of ours by now.
        pl_module.stop_flag.install()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, WrinkleFreeLightningModule)
        report = pl_module.report
        assert report is not None
        if report.step % self.interval == 0 or report.stop or trainer.should_stop:
            self.save(trainer, report.step)
        if report.stop:
            trainer.should_stop = True

    def save(self, trainer: pl.Trainer, step: int) -> None:
        """Write step `step` unless it is there."""
        if step == self.saved_step:
            return
        module = trainer.lightning_module
        if isinstance(module, WrinkleFreeLightningModule) and module.teacher is not None:
            module.teacher.flush()  # what comes after this step may read what was said before it
        if trainer.is_global_zero:
            target = self.directory.checkpoint(step)
            self._save(target)
            self.directory.forget_old(self.keep_last_n, newest=target, waiting=self._save.waiting)
        self.saved_step = step
        trainer.strategy.barrier()
