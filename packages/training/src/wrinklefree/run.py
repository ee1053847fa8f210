"""A run on one page: config, directory, data, student and teacher, objectives, trainer, checkpoint."""

import logging
import os
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import SIGTERMException

from durable import ExitCode, UserError
from wrinklefree.config import RunConfig, to_dict, to_yaml
from wrinklefree.lightning.callbacks.influence import InfluenceTrackerCallback
from wrinklefree.lightning.callbacks.metrics import MetricsCallback
from wrinklefree.lightning.callbacks.non_finite import NonFiniteCallback
from wrinklefree.lightning.callbacks.progress import ProgressCallback
from wrinklefree.lightning.callbacks.ramps import RampCallback
from wrinklefree.lightning.callbacks.saving import CheckpointCallback
from wrinklefree.lightning.callbacks.validation import ValidationCallback
from wrinklefree.lightning.datamodule import WrinkleFreeDataModule
from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.objectives import create_objective_manager
from wrinklefree.optimizers.state import join_state, split_state
from wrinklefree.training.checkpoint import Part, TrainState, read_train_state, write_checkpoint
from wrinklefree.training.data import calibration_batches, open_loader, prepare_data
from wrinklefree.training.metrics import MetricsWriter
from wrinklefree.training.ranks import Ranks, joined_ranks
from wrinklefree.training.resuming import require_same_run
from wrinklefree.training.run_directory import FINAL, RunDirectory, find_checkpoint
from wrinklefree.training.signals import StopFlag, watched_signals
from wrinklefree.training.student import build_models

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
    manager = create_objective_manager(config.training.objectives)
    directory = RunDirectory.of(config)
    with ExitStack() as closing:
        ranks = closing.enter_context(joined_ranks(config.distributed))
        if ranks.is_first:
            closing.enter_context(directory.held())
        stop_flag = StopFlag()
        closing.enter_context(watched_signals(stop_flag))
        start = _starting_point(config, directory, ranks)
        if start is not None and start.is_complete(config, directory):
            logger.info("this run is complete: %d steps, %s", start.state.step, start.checkpoint)
            return RunResult(directory.path, start.state.step, 0)

        if ranks.is_first:
            prepare_data(config)
        ranks.barrier()
        data = prepare_data(config)
        models = build_models(
            config,
            checkpoint=start.checkpoint if start else None,
            needs_teacher=manager.needs().teacher_logits,
            calibration=calibration_batches(config, data),
        )
        loader = closing.enter_context(
            open_loader(config, data, rank=ranks.rank, world_size=ranks.world_size)
        )
        writer = None
        if ranks.is_first:
            (directory.path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            writer = MetricsWriter(directory.metrics)
            closing.callback(writer.close)

        training = config.training
        module = WrinkleFreeLightningModule(
            models.student,
            manager,
            models.teacher,
            training.optimizer,
            training.scheduler,
            training.gradient_clipping,
            max_steps=config.max_steps,
            seed=config.seed,
            stop_flag=stop_flag,
        )
        module.progress.ramp_steps = {
            "lambda": training.lambda_warmup.steps(config.max_steps),
            "mu": training.subln_warmup.steps(config.max_steps),
        }
        ramps = RampCallback(training.lambda_warmup.schedule, training.subln_warmup.schedule)
        non_finite = NonFiniteCallback(writer, max_skipped=training.non_finite.max_skipped)
        parts: dict[str, Part] = {
            "progress": module.progress,
            "data": loader,
            "clipping": module.clipper,
            "non_finite": non_finite,
        }
        callbacks: list[pl.Callback] = [
            ramps,
            MetricsCallback(writer, ramps, loader.schedule),
            non_finite,
        ]
        if training.influence.enabled:
            influence = InfluenceTrackerCallback(
                training.influence, models.student, loader, data, seed=config.seed, writer=writer
            )
            callbacks.append(influence)
            parts["influence"] = influence
        callbacks.append(
            ValidationCallback(
                training.validation, data.probes(), ramps, block_size=training.max_seq_length, writer=writer
            )
        )

        def save(target: Path) -> None:
            tensors, numbers = split_state(module.optimizer)
            state = TrainState(
                step=module.progress.step,
                config=_identity(config, ranks),
                parts={name: part.state_dict() for name, part in parts.items()},
                optimizer=numbers,
                tensors=tensors,
            )
            write_checkpoint(
                target, models.student, state, tokenizer=models.tokenizer, stage=training.stage.value
            )

        saving = CheckpointCallback(
            directory,
            save,
            interval=training.checkpoint.save_interval,
            keep_last_n=training.checkpoint.keep_last_n,
        )
        callbacks.append(saving)
        if ranks.is_first:
            callbacks.append(ProgressCallback(ramps, every=training.logging.log_interval))
        if start is not None:
            start.restore(config, module, parts)
            saving.saved_step = module.progress.step if start.is_own else -1
            if writer is not None:
                event = {"event": "resumed", "step": module.progress.step, "from": str(start.checkpoint)}
                writer.write("event", event)
                print(f"resuming after step {module.progress.step} from {start.checkpoint}", flush=True)

        trainer = _trainer(config, callbacks, ranks)
        data_module = WrinkleFreeDataModule(loader, training.gradient_accumulation_steps)
        try:
            trainer.fit(module, datamodule=data_module)
        except SIGTERMException:  # it came before `CheckpointCallback` took the signals over
            saving.save(trainer, module.progress.step)
        step = module.progress.step
        is_done = step >= config.max_steps
        if is_done and ranks.is_first and training.checkpoint.save_at_end:
            save(directory.checkpoints / FINAL)
            print(f"finished {step} steps: {directory.checkpoints / FINAL}", flush=True)
        ranks.barrier()
        return RunResult(directory.path, step, 0 if is_done else stop_flag.exit_code or SIGNALLED)


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """A checkpoint to go on from."""

    checkpoint: Path
    state: TrainState
    is_own: bool
    """Whether it lies in this run's directory."""

    def is_complete(self, config: RunConfig, directory: RunDirectory) -> bool:
        """Nothing is left to do: not a step, and not the final checkpoint, which a kill may have cost."""
        wants_final = config.training.checkpoint.save_at_end
        has_final = (directory.checkpoints / FINAL / "manifest.json").is_file()
        return self.is_own and self.state.step >= config.max_steps and (has_final or not wants_final)

    def restore(self, config: RunConfig, module: WrinkleFreeLightningModule, parts: dict[str, Part]) -> None:
        """Bring optimizer, data and everything else to where the checkpoint left them."""
        wanted = config.training.resume
        if self.is_own or wanted.load_optimizer_state:
            # Learning rates and the like are the configuration's business.
            join_state(module.optimizer, self.state.tensors, self.state.optimizer, with_options=False)
        if self.is_own or wanted.load_training_state:
            for name, part in parts.items():
                if name in self.state.parts:
                    part.load_state_dict(self.state.parts[name])
            if not self.is_own and not wanted.load_scheduler_state:
                module.progress.schedule_start = module.progress.step


def _starting_point(config: RunConfig, directory: RunDirectory, ranks: Ranks) -> StartingPoint | None:
    """The run's own newest checkpoint, else the one that the configuration names, else none."""
    resume = config.training.resume
    own = ranks.shared(directory.newest() if ranks.is_first else None)
    is_own = own is not None and resume.auto
    if own is not None and not resume.auto:
        raise UserError(
            f"{directory.path}: holds checkpoints, and training.resume.auto is false",
            own.name,
            "choose another experiment_name, or set training.resume.auto=true",
            ExitCode.BUSY,
        )
    path = own if is_own else (find_checkpoint(resume.checkpoint_path) if resume.checkpoint_path else None)
    if path is None:
        return None
    state = read_train_state(path)
    if is_own:
        require_same_run(
            state.config["keys"],
            to_dict(config),
            saved_sizes=state.config["sizes"],
            sizes=_sizes(config, ranks),
            allow=resume.allow,
        )
    return StartingPoint(path, state, is_own)


def _identity(config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    return {"keys": to_dict(config), "sizes": _sizes(config, ranks)}


def _sizes(config: RunConfig, ranks: Ranks) -> dict[str, int]:
    training = config.training
    per_rank = training.batch_size * training.gradient_accumulation_steps
    return {"max_steps": config.max_steps, "samples_per_step": per_rank * ranks.world_size}


def _trainer(config: RunConfig, callbacks: list[pl.Callback], ranks: Ranks) -> pl.Trainer:
    # Checkpoints, loggers and progress are ours: Lightning's are not exact (docs/architecture.md).
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    return pl.Trainer(
        accelerator="auto",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if ranks.world_size > 1 else 1,
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
        strategy=DDPStrategy(gradient_as_bucket_view=True) if ranks.world_size > 1 else "auto",
        precision="bf16-mixed" if config.training.precision == "bf16" else "32-true",
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        inference_mode=False,
    )
