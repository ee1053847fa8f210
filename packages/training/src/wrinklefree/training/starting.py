"""Where a run starts: at its own newest checkpoint, at one that the configuration names, or at sample 0."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from durable import ExitCode, UserError
from wrinklefree.config import RunConfig, to_dict
from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.optimizers.state import join_state
from wrinklefree.training.checkpoint import Part, TrainState, read_train_state
from wrinklefree.training.metrics import MetricsWriter
from wrinklefree.training.ranks import Ranks
from wrinklefree.training.resuming import require_same_run
from wrinklefree.training.run_directory import FINAL, RunDirectory, find_checkpoint


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

    def announce(self, step: int, writer: MetricsWriter) -> None:
        writer.write("event", {"event": "resumed", "step": step, "from": str(self.checkpoint)})
        print(f"resuming after step {step} from {self.checkpoint}", flush=True)


def starting_point(config: RunConfig, directory: RunDirectory, ranks: Ranks) -> StartingPoint | None:
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


def identity(config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """What a checkpoint keeps of the configuration, for `require_same_run`."""
    return {"keys": to_dict(config), "sizes": _sizes(config, ranks)}


def _sizes(config: RunConfig, ranks: Ranks) -> dict[str, int]:
    training = config.training
    per_rank = training.batch_size * training.gradient_accumulation_steps
    return {"max_steps": config.max_steps, "samples_per_step": per_rank * ranks.world_size}
