"""Lightning's trainer with everything off that is ours: it brings devices, ranks, precision and the loop."""

import logging
import os
import warnings

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy

from wrinklefree.config import RunConfig
from wrinklefree.training.ranks import Ranks


def lightning_trainer(
    config: RunConfig, callbacks: list[pl.Callback], ranks: Ranks, *, reaches_all: bool
) -> pl.Trainer:
    """For `fit(module, datamodule=…)` over one epoch, which is the whole run.

    `reaches_all`: every parameter that learns gets a gradient in every step.
    """
    ddp = DDPStrategy(gradient_as_bucket_view=True, find_unused_parameters=not reaches_all)
    # Checkpoints, loggers and progress are ours: Lightning's are not exact (docs/architecture.md).
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    return pl.Trainer(
        accelerator="auto",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if ranks.world_size > 1 else 1,
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
        strategy=ddp if ranks.world_size > 1 else "auto",
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
