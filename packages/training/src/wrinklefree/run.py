"""A run on one page: config, directory, data, student and teacher, objectives, trainer, checkpoint."""

import logging
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from durable import ExitCode, UserError
from wrinklefree.config import RunConfig, to_dict, to_yaml
from wrinklefree.lightning.callbacks.influence import InfluenceTrackerCallback
from wrinklefree.lightning.callbacks.logging import MetricsCallback
from wrinklefree.lightning.callbacks.non_finite import NonFiniteCallback
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
from wrinklefree.training.resuming import require_same_run
from wrinklefree.training.run_directory import FINAL, RunDirectory, find_checkpoint
from wrinklefree.training.signals import StopFlag, watched_signals
from wrinklefree.training.student import build_models

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended."""

    directory: Path
    step: int
    exit_code: int


def run(config: RunConfig) -> RunResult:
    """Train until the end or until somebody asks to stop; UserError for what a person can put right."""
    directory = RunDirectory.of(config)
    with ExitStack() as closing:
        closing.enter_context(directory.held())
        stop_flag = StopFlag()
        closing.enter_context(watched_signals(stop_flag))
        start = _starting_point(config, directory)
        manager = create_objective_manager(config.training.objectives)
        if start is not None and start.is_own and start.state.step >= config.max_steps:
            logger.info("this run is complete: %d steps, %s", start.state.step, start.checkpoint)
            return RunResult(directory.path, start.state.step, 0)

        data = prepare_data(config)
        models = build_models(
            config,
            checkpoint=start.checkpoint if start else None,
            needs_teacher=manager.needs().teacher_logits,
            calibration=calibration_batches(config, data),
        )
        loader = closing.enter_context(open_loader(config, data))
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
            MetricsCallback(writer, ramps, log_interval=training.logging.log_interval),
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
                config=_identity(config),
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
        if start is not None:
            start.restore(config, module, parts)
            saving.saved_step = module.progress.step if start.is_own else -1
            writer.write("event", {"event": "resumed", "step": module.progress.step, "from": str(start.checkpoint)})
            print(f"resuming after step {module.progress.step} from {start.checkpoint}", flush=True)

        trainer = _trainer(config, callbacks)
        trainer.fit(module, datamodule=WrinkleFreeDataModule(loader, training.gradient_accumulation_steps))
        step = module.progress.step
        if step >= config.max_steps and training.checkpoint.save_at_end and trainer.is_global_zero:
            save(directory.checkpoints / FINAL)
            print(f"finished {step} steps: {directory.checkpoints / FINAL}", flush=True)
            return RunResult(directory.path, step, 0)
        return RunResult(directory.path, step, stop_flag.exit_code)


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """A checkpoint to go on from."""

    checkpoint: Path
    state: TrainState
    is_own: bool
    """Whether it lies in this run's directory."""

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


def _starting_point(config: RunConfig, directory: RunDirectory) -> StartingPoint | None:
    """The run's own newest checkpoint, else the one that the configuration names, else none."""
    resume = config.training.resume
    own = directory.newest()
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
            sizes=_sizes(config),
            allow=resume.allow,
        )
    return StartingPoint(path, state, is_own)


def _identity(config: RunConfig) -> dict[str, Any]:
    return {"keys": to_dict(config), "sizes": _sizes(config)}


def _sizes(config: RunConfig) -> dict[str, int]:
    training = config.training
    return {
        "max_steps": config.max_steps,
        "samples_per_step": training.batch_size * training.gradient_accumulation_steps,
    }


def _trainer(config: RunConfig, callbacks: list[pl.Callback]) -> pl.Trainer:
    # Checkpoints, loggers and progress are ours: Lightning's are not exact (docs/architecture.md).
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    return pl.Trainer(
        accelerator="auto",
        devices=1,
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
