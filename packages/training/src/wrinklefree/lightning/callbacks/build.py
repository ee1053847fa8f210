"""The callbacks of a run, in the order in which they act, and what of them goes into a checkpoint.

    before a step   ramps set λ and μ
    after it        metrics ─► non-finite guard ─► influence ─► validation ─► (saving) ─► progress

Whatever changes its state after a step does so before the step is saved.
"""

from dataclasses import dataclass

import pytorch_lightning as pl

from data_handler import TrainingLoader
from wrinklefree.config import RunConfig
from wrinklefree.lightning.callbacks.influence import InfluenceTrackerCallback
from wrinklefree.lightning.callbacks.metrics import MetricsCallback
from wrinklefree.lightning.callbacks.non_finite import NonFiniteCallback
from wrinklefree.lightning.callbacks.progress import ProgressCallback
from wrinklefree.lightning.callbacks.ramps import RampCallback
from wrinklefree.lightning.callbacks.validation import ValidationCallback
from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.training.checkpoint import Part
from wrinklefree.training.data import PreparedData
from wrinklefree.training.metrics import MetricsWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCallbacks:
    """What acts around the steps of a run."""

    before_saving: list[pl.Callback]
    after_saving: list[pl.Callback]
    parts: dict[str, Part]
    """Name → what a checkpoint keeps, of the callbacks and of what they stand on."""


def build_callbacks(
    config: RunConfig,
    module: WrinkleFreeLightningModule,
    loader: TrainingLoader,
    data: PreparedData,
    writer: MetricsWriter | None,
) -> RunCallbacks:
    """Ranks without a writer have the same callbacks, since all must act alike, and write nothing."""
    training = config.training
    ramps = RampCallback(training.lambda_warmup.schedule, training.subln_warmup.schedule)
    non_finite = NonFiniteCallback(writer, max_skipped=training.non_finite.max_skipped)
    parts: dict[str, Part] = {
        "progress": module.progress,
        "data": loader,
        "clipping": module.clipper,
        "non_finite": non_finite,
    }
    callbacks: list[pl.Callback] = [ramps, MetricsCallback(writer, ramps, loader.schedule), non_finite]
    if training.influence.enabled:
        influence = InfluenceTrackerCallback(
            training.influence, module.model, loader, data, seed=config.seed, writer=writer
        )
        callbacks.append(influence)
        parts["influence"] = influence
    callbacks.append(
        ValidationCallback(
            training.validation, data.probes(), ramps, block_size=training.max_seq_length, writer=writer
        )
    )
    progress = [ProgressCallback(ramps, every=training.logging.log_interval)] if writer is not None else []
    return RunCallbacks(before_saving=callbacks, after_saving=[*progress], parts=parts)
