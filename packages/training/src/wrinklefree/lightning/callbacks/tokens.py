"""Ends a run whose length is given in tokens when it has read them.

Steps are derived from the tokens when a run begins. A resume that was allowed another batch size would read
more or fewer; the count, which every checkpoint keeps, holds whatever the steps are. Blocks are packed, so
every token of a block is one of a document and none is padding.
"""

import pytorch_lightning as pl

from wrinklefree.config.schema import RunConfig
from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.training.ending import tokens_are_used_up


class TokenCountCallback(pl.Callback):
    """Counting is the module's, in `progress.num_tokens`: tokens of all ranks."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, WrinkleFreeLightningModule)
        if tokens_are_used_up(self.config, pl_module.progress.num_tokens):
            trainer.should_stop = True
