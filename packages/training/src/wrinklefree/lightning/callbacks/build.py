"""The callbacks of a run, in the order in which they act, and what of them goes into a checkpoint.

    before a step   curriculum sets the weights of objectives and of sources, ramps set λ, μ and sparsity,
                    balance measures the objectives' gradients
    after it        metrics ─► non-finite guard ─► influence ─► ternary statistics ─► validation
                      ─► is the run over? ─► best ─► saving ─► samples ─► progress

Whatever changes its state after a step does so before the step is saved.
"""

from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl

from data_handler import TrainingLoader
from wrinklefree.config import RunConfig
from wrinklefree.lightning.callbacks.balance import BalanceCallback
from wrinklefree.lightning.callbacks.best import BestCheckpointCallback
from wrinklefree.lightning.callbacks.curriculum import CurriculumCallback
from wrinklefree.lightning.callbacks.early_stopping import EarlyStoppingCallback
from wrinklefree.lightning.callbacks.frozen import FrozenCallback
from wrinklefree.lightning.callbacks.influence import InfluenceTrackerCallback
from wrinklefree.lightning.callbacks.metrics import MetricsCallback
from wrinklefree.lightning.callbacks.non_finite import NonFiniteCallback
from wrinklefree.lightning.callbacks.phase_data import PhaseDataCallback
from wrinklefree.lightning.callbacks.progress import ProgressCallback
from wrinklefree.lightning.callbacks.ramps import RampCallback
from wrinklefree.lightning.callbacks.samples import SamplesCallback
from wrinklefree.lightning.callbacks.saving import CheckpointCallback
from wrinklefree.lightning.callbacks.ternary import TernaryStatisticsCallback
from wrinklefree.lightning.callbacks.tokens import TokenCountCallback
from wrinklefree.lightning.callbacks.validation import ValidationCallback
from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.objectives import CurriculumScheduler
from wrinklefree.training.checkpoint import Part, Saver
from wrinklefree.training.data import PreparedData
from wrinklefree.training.metrics import MetricsWriter
from wrinklefree.training.run_directory import BEST, RunDirectory
from wrinklefree.training.student import Models
from wrinklefree.training.uploading import Uploader


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCallbacks:
    """What acts around the steps of a run."""

    all: list[pl.Callback]
    parts: dict[str, Part]
    """Name → what a checkpoint keeps, of the callbacks and of what they stand on."""
    save: Saver
    saving: CheckpointCallback

    def states(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint would hold of the parts now."""
        return {name: part.state_dict() for name, part in self.parts.items()}


def build_callbacks(
    config: RunConfig,
    directory: RunDirectory,
    *,
    curriculum: CurriculumScheduler | None,
    identity: dict[str, Any],
    data: PreparedData,
    loader: TrainingLoader,
    models: Models,
    module: WrinkleFreeLightningModule,
    uploader: Uploader | None,
    writer: MetricsWriter | None,
) -> RunCallbacks:
    """Ranks without a writer have the same callbacks, since all must act alike, and write nothing.

    `identity` is what a resume is compared with.
    """
    training = config.training
    ramps = RampCallback(training)
    non_finite = NonFiniteCallback(
        writer, directory.path, models.tokenizer, max_skipped=training.non_finite.max_skipped
    )
    validation = ValidationCallback(
        training.validation, data.probes(), ramps, block_size=training.max_seq_length, writer=writer
    )
    parts: dict[str, Part] = {
        "progress": module.progress,
        "data": loader,
        "clipping": module.clipper,
        "non_finite": non_finite,
    }
    save = Saver(
        config=identity,
        stage=training.stage.value,
        models=models,
        optimizer=module.optimizer,
        progress=module.progress,
        parts=parts,
        uploader=uploader,
    )
    saving = CheckpointCallback(
        directory,
        save,
        interval=training.checkpoint.save_interval,
        keep_last_n=training.checkpoint.keep_last_n,
    )
    callbacks: list[pl.Callback] = [ramps, MetricsCallback(writer, ramps, loader.schedule), non_finite]
    if len(module.objective_manager.objectives) > 1 and training.balance.interval is not None:
        parts["balance"] = balance = BalanceCallback(training.balance, writer)
        callbacks.insert(1, balance)
    if curriculum is not None:
        callbacks.insert(0, CurriculumCallback(curriculum, writer))
    influence = None
    if training.influence.enabled:
        parts["influence"] = influence = InfluenceTrackerCallback(
            training.influence, models.student, loader, data, seed=config.seed, writer=writer
        )
        callbacks.append(influence)
    if curriculum is not None and len(data.weights_of) > 1:
        callbacks.insert(0, PhaseDataCallback(curriculum, data, loader, influence, writer))
    if training.logging.ternary_interval is not None:
        parts["ternary"] = ternary = TernaryStatisticsCallback(
            writer, every=training.logging.ternary_interval
        )
        callbacks.append(ternary)
    if any(not parameter.requires_grad for parameter in models.student.parameters()):
        parts["frozen"] = frozen = FrozenCallback(writer)
        callbacks.append(frozen)
    callbacks += [validation, TokenCountCallback(config)]
    if training.early_stopping.enabled:
        parts["early_stopping"] = stopping = EarlyStoppingCallback(
            training.early_stopping, validation, writer
        )
        callbacks.append(stopping)
    if training.checkpoint.save_best and training.validation.every is not None:
        parts["best"] = best = BestCheckpointCallback(directory.checkpoints / BEST, save, validation)
        callbacks.append(best)
    callbacks.append(saving)
    if training.samples.every is not None:
        callbacks.append(
            SamplesCallback(
                training.samples,
                models.tokenizer,
                ramps,
                directory.path / "samples.jsonl" if writer is not None else None,
                seed=config.seed,
                longest=getattr(models.student.config, "max_position_embeddings", 2**31),
            )
        )
    if writer is not None:
        every, block_size = training.logging.log_interval, training.max_seq_length
        callbacks.append(ProgressCallback(ramps, every=every, block_size=block_size))
    return RunCallbacks(all=callbacks, parts=parts, save=save, saving=saving)
