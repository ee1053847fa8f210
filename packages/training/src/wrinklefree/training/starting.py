"""Where a run starts: at its own newest checkpoint, else where a person says, else at what its stage follows.

    own newest ─► training.resume.checkpoint_path ─► $RESUME_CHECKPOINT ─► nearest earlier stage ─► pretrained

A run that has a checkpoint of its own never falls back to where it began. From a checkpoint that a person
named, `training.resume` says what is taken over; from an earlier stage, the model alone.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from durable import ExitCode, UserError, newest_complete
from wrinklefree.config import RunConfig, to_dict
from wrinklefree.config.schema import Stage
from wrinklefree.lightning.module import Progress, WrinkleFreeLightningModule
from wrinklefree.optimizers.state import join_state
from wrinklefree.training.checkpoint import Part, TrainState, read_train_state
from wrinklefree.training.data import PreparedData
from wrinklefree.training.ending import why_over
from wrinklefree.training.fetching import fetched_if_any
from wrinklefree.training.metrics import MetricsWriter
from wrinklefree.training.ranks import Ranks
from wrinklefree.training.resuming import require_same_data, require_same_run
from wrinklefree.training.run_directory import BEST, FINAL, RunDirectory, find_checkpoint, step_of
from wrinklefree.training.uploading import bucket_address, run_folder

VARIABLE = "RESUME_CHECKPOINT"
PREDECESSORS = {
    Stage.stage1_9: (Stage.stage1,),
    Stage.stage2: (Stage.stage1_9, Stage.stage1),
    Stage.stage3: (Stage.stage2, Stage.stage1_9, Stage.stage1),
    Stage.lrc: (Stage.stage3, Stage.stage2, Stage.stage1_9, Stage.stage1),
}
"""Whose model a stage takes, the nearest first. The others start from the pretrained model."""
OF_DIRECTORY = ("best", "early_stopping", "ternary")
"""Parts of a checkpoint that say something of its own run directory."""


class Origin(StrEnum):
    """Whose checkpoint it is."""

    own = "own"
    """This run's."""
    named = "named"
    """A person said so."""
    stage = "stage"
    """An earlier stage's."""


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """A checkpoint to go on from."""

    checkpoint: Path
    state: TrainState
    origin: Origin

    @property
    def is_own(self) -> bool:
        """Whether it lies in this run's directory."""
        return self.origin is Origin.own

    def takes_what_fits(self, config: RunConfig) -> bool:
        """Whether the configured model gets the weights, instead of the one that was saved."""
        return self.origin is Origin.named and not config.training.resume.strict_model_load

    def why_complete(self, config: RunConfig, directory: RunDirectory) -> str | None:
        """Why nothing is left to do: not a step, and not the final checkpoint, which a kill may have cost."""
        wants_final = config.training.checkpoint.save_at_end
        final = directory.checkpoints / FINAL
        has_final = (final / "manifest.json").is_file() and step_of(final) == self.state.step
        if not self.is_own or (wants_final and not has_final):
            return None
        return why_over(config, self.state.parts)

    def require_same_data(self, data: PreparedData, config: RunConfig) -> None:
        """The shards that a run goes on with are those that it read before."""
        if self.is_own:
            require_same_data(
                self.state.config["data"], data.fingerprints(), allow=config.training.resume.allow
            )

    def restore(self, config: RunConfig, module: WrinkleFreeLightningModule, parts: dict[str, Part]) -> None:
        """Bring optimizer, data and everything else to where the checkpoint left them."""
        saved = Progress()
        saved.load_state_dict(self.state.parts["progress"])
        if self.origin is Origin.stage:
            _keep_what_arrived(module.progress, saved)
            return
        wanted = config.training.resume
        if self.is_own or wanted.load_optimizer_state:
            # Learning rates and the like are the configuration's business.
            join_state(module.optimizer, self.state.tensors, self.state.optimizer, with_options=False)
        configured = dict(module.progress.ramp_steps)
        if self.is_own or wanted.load_training_state:
            # Which step was the best, say, is known of this directory only.
            known = (
                parts if self.is_own else {name: parts[name] for name in parts if name not in OF_DIRECTORY}
            )
            self.state.restore(known)
        if not self.is_own:
            # The schedules' first step, seen from the step that this run is at now.
            steps_behind = saved.step - saved.schedule_start if wanted.load_scheduler_state else 0
            module.progress.schedule_start = module.progress.step - steps_behind
            ramp_steps = configured | saved.ramp_steps if wanted.load_scheduler_state else configured
            module.progress.ramp_steps = ramp_steps

    def announce(self, step: int, writer: MetricsWriter) -> None:
        event = {"event": "resumed", "step": step, "from": str(self.checkpoint), "origin": self.origin.value}
        writer.write("event", event)
        if self.origin is Origin.own:
            print(f"resuming after step {step} from {self.checkpoint}", flush=True)
        else:
            print(f"starting at step {step} from {self.checkpoint}", flush=True)


def _keep_what_arrived(progress: Progress, saved: Progress) -> None:
    """What an earlier stage made ternary stays so: λ and μ do not go back once they stood at 1."""
    last = saved.step - 1 - saved.schedule_start
    for name, length in saved.ramp_steps.items():
        if last >= length:
            progress.ramp_steps[name] = 0


def starting_point(config: RunConfig, directory: RunDirectory, ranks: Ranks) -> StartingPoint | None:
    """None for a run that starts from the pretrained model."""
    resume = config.training.resume
    own = ranks.found_by_first(directory.newest)
    if own is not None:
        if not resume.auto:
            raise UserError(
                f"{directory.path}: holds checkpoints, and training.resume.auto is false",
                own.name,
                "choose another experiment_name, or set training.resume.auto=true",
                ExitCode.BUSY,
            )
        state = read_train_state(own)
        require_same_run(
            state.config["keys"],
            to_dict(config),
            saved_sizes=state.config["sizes"],
            sizes=_sizes(config, ranks),
            allow=resume.allow,
        )
        return StartingPoint(own, state, Origin.own)
    named = named_start(config)
    if named is not None:
        key, place = named
        path = ranks.first_then_all(lambda: find_checkpoint(place, key=key))
        return StartingPoint(path, read_train_state(path), Origin.named)
    earlier = ranks.found_by_first(lambda: _nearest_stage(config, directory))
    return None if earlier is None else StartingPoint(earlier, read_train_state(earlier), Origin.stage)


def named_start(config: RunConfig, environment: Mapping[str, str] = os.environ) -> tuple[str, str] | None:
    """(what it was written for, where a person wants an empty run directory to start)."""
    if config.training.resume.checkpoint_path:
        return "training.resume.checkpoint_path", config.training.resume.checkpoint_path
    return (VARIABLE, environment[VARIABLE]) if environment.get(VARIABLE) else None


def _nearest_stage(config: RunConfig, directory: RunDirectory) -> Path | None:
    """The newest checkpoint of the nearest earlier stage that has one; says which, or that there is none."""
    stages = PREDECESSORS.get(config.training.stage, ())
    for stage in stages:
        path = _newest_of(config, directory.of_stage(stage))
        if path is not None:
            print(f"{config.training.stage.value} follows {stage.value}: {path}", flush=True)
            return path
    if stages:
        print(
            f"{config.training.stage.value} starts from {config.model.pretrained_name}: "
            f"no checkpoint of {', '.join(stages)} beside {directory.path}",
            flush=True,
        )
    return None


def _newest_of(config: RunConfig, directory: RunDirectory) -> Path | None:
    """Another run's newest checkpoint: on this disk, else in the bucket, else on the hub."""
    path = newest_complete(directory.checkpoints, ignore=(BEST,)).or_raise().path
    folder = run_folder(config, directory)
    if path is None and config.gcs.enabled:
        address = f"{bucket_address(config).rstrip('/')}/{folder}"
        path = fetched_if_any(address, key="gcs.bucket", ignore=(BEST,))
    if path is None and config.hub.repo is not None:
        path = fetched_if_any(f"hf://{config.hub.repo}/{folder}", key="hub.repo", ignore=(BEST,))
    return path


def identity(config: RunConfig, ranks: Ranks, data: PreparedData) -> dict[str, Any]:
    """What a checkpoint keeps of configuration and data, for `require_same_run` and `require_same_data`."""
    return {"keys": to_dict(config), "sizes": _sizes(config, ranks), "data": data.fingerprints()}


def samples_per_step(config: RunConfig, ranks: Ranks) -> int:
    """Of all ranks."""
    training = config.training
    return training.batch_size * training.gradient_accumulation_steps * ranks.world_size


def _sizes(config: RunConfig, ranks: Ranks) -> dict[str, int]:
    return {"max_steps": config.max_steps, "samples_per_step": samples_per_step(config, ranks)}
