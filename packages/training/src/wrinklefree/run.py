"""A run on one page: directory, start, data, models, objectives, callbacks, checkpoints, trainer."""

import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from pytorch_lightning.utilities.exceptions import SIGTERMException

from wrinklefree.config import RunConfig
from wrinklefree.lightning.callbacks.build import build_callbacks
from wrinklefree.lightning.datamodule import WrinkleFreeDataModule
from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.lightning.trainer import lightning_trainer
from wrinklefree.objectives import create_curriculum_scheduler, create_objective_manager
from wrinklefree.teachers.local import LocalTeacher
from wrinklefree.training.batch_size import with_fitting_batch
from wrinklefree.training.data import CalibrationBatches, open_loader, prepare_data
from wrinklefree.training.ending import why_over
from wrinklefree.training.exporting import try_export
from wrinklefree.training.ranks import joined_ranks
from wrinklefree.training.recording import recorded
from wrinklefree.training.run_directory import FINAL, RunDirectory
from wrinklefree.training.running_out import memory_explained, warn_about_room
from wrinklefree.training.signals import StopFlag, watched_signals
from wrinklefree.training.starting import identity, samples_per_step, starting_point
from wrinklefree.training.student import build_models
from wrinklefree.training.uploading import open_uploader
from wrinklefree.training.wandb_process import require_wandb

logger = logging.getLogger(__name__)
SIGNALLED = 143
"""Exit code of a rank that stopped because another was asked to."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended."""

    directory: Path
    step: int
    exit_code: int


def run(config: RunConfig) -> RunResult:
    """Train until the end or until somebody asks to stop; UserError for what a person can put right."""
    training, directory = config.training, RunDirectory.of(config)
    curriculum = create_curriculum_scheduler(training.curriculum, config.max_steps)
    manager = create_objective_manager(
        training.objectives, curriculum, diffusion=training.diffusion, seed=config.seed
    )
    require_wandb(training.logging.wandb)
    with ExitStack() as closing:
        closing.enter_context(memory_explained(config))
        ranks = closing.enter_context(joined_ranks(config.distributed))
        if ranks.is_first:
            closing.enter_context(directory.held())
        uploader = open_uploader(config, directory) if ranks.is_first else None
        if uploader is not None:
            closing.callback(uploader.wait)
            uploader.submit_missing(directory.checkpoints)

        start = starting_point(config, directory, ranks)
        if start is not None and (why := start.why_complete(config, directory)) is not None:
            logger.info("this run is complete after %s: %s", why, start.checkpoint)
            if uploader is not None:
                uploader.finish()
            return RunResult(directory.path, start.state.step, 0)

        data = ranks.first_then_all(lambda: prepare_data(config))
        # Until here nothing is lost by ending at once.
        stop_flag = StopFlag()
        closing.enter_context(watched_signals(stop_flag))
        if start is not None:
            start.require_same_data(data, config)
        models = build_models(
            config,
            checkpoint=start.checkpoint if start else None,
            takes_what_fits=start is not None and start.takes_what_fits(config),
            needs=manager.needs(manager.objectives),
            calibration=CalibrationBatches(config, data),
            sources=data.fingerprints(),
        )
        if isinstance(models.teacher, LocalTeacher):
            manager.check_models(models.student, models.teacher.model)
        if start is None or not start.is_own:
            ranks.found_by_first(lambda: try_export(models.student, models.tokenizer, config))
        config = with_fitting_batch(config, directory.path, models, manager, ranks)
        training = config.training
        loader = closing.enter_context(
            open_loader(config, data, rank=ranks.rank, world_size=ranks.world_size)
        )
        module = WrinkleFreeLightningModule.of(config, models, manager, stop_flag)
        closing.callback(module.release_teacher)
        models = replace(models, teacher=None)  # the module alone holds it, and may let it go

        writer = None
        if ranks.is_first:
            warn_about_room(directory.path, models.student)
            writer = closing.enter_context(recorded(config, directory, data))
        callbacks = build_callbacks(
            config,
            directory,
            curriculum=curriculum,
            identity=identity(config, ranks, data),
            data=data,
            loader=loader,
            models=models,
            module=module,
            uploader=uploader,
            writer=writer,
        )
        if start is not None:
            loader.num_samples = start.state.parts["data"]["next_sample"]  # a seek there is always possible
            start.restore(config, module, callbacks.parts)
            # Steps behind us may have had another number of samples.
            steps_left = max(0, config.max_steps - module.progress.step)
            loader.num_samples = loader.next_sample + steps_left * samples_per_step(config, ranks)
            callbacks.saving.saved_step = module.progress.step if start.is_own else -1
            if writer is not None:
                start.announce(module.progress.step, writer)

        if why_over(config, callbacks.states()) is None:
            trainer = lightning_trainer(config, callbacks.all, ranks, reaches_all=manager.reaches_all)
            data_module = WrinkleFreeDataModule(loader, training.gradient_accumulation_steps)
            try:
                trainer.fit(module, datamodule=data_module)
            except SIGTERMException:  # it came before `CheckpointCallback` took the signals over
                callbacks.saving.save(trainer, module.progress.step)

        step, why = module.progress.step, why_over(config, callbacks.states())
        if why is not None and ranks.is_first and training.checkpoint.save_at_end:
            callbacks.save(directory.checkpoints / FINAL)
            print(f"finished after {why}: {directory.checkpoints / FINAL}", flush=True)
        ranks.barrier()
        if why is not None and uploader is not None:
            uploader.finish()
        return RunResult(directory.path, step, 0 if why is not None else stop_flag.exit_code or SIGNALLED)
