"""A run ends when validation has stopped getting better: `patience` times in a row not by `min_delta`."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl

from wrinklefree.config.schema import EarlyStoppingConfig
from wrinklefree.lightning.callbacks.validation import ValidationCallback
from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.training.metrics import MetricsWriter


class EarlyStoppingCallback(pl.Callback):
    """Looks at the mean validation loss at λ = μ = 1. Its state tells whether a run is over."""

    def __init__(
        self, config: EarlyStoppingConfig, validation: ValidationCallback, writer: MetricsWriter | None
    ) -> None:
        self.config = config
        self.validation = validation
        self.writer = writer
        self.state: dict[str, Any] = {"best": None, "best_step": 0, "num_waited": 0, "num_evals": 0}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = dict(state)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, WrinkleFreeLightningModule)
        step = pl_module.progress.step
        loss = self.validation.loss_of(step)
        if loss is None:
            return
        self.observe(loss, step)
        why = plateau(self.state, self.config)
        if why is not None:
            trainer.should_stop = True
            if self.writer is not None:
                self.writer.write("event", {"event": "early_stopping", "step": step, "reason": why})
                print(f"stopping early at step {step}: {why}", flush=True)

    def observe(self, loss: float, step: int) -> None:
        """Count a validation. A loss that is no finite number is no improvement."""
        state = self.state
        state["num_evals"] += 1
        if loss < (float("inf") if state["best"] is None else state["best"] - self.config.min_delta):
            state.update(best=loss, best_step=step, num_waited=0)
        else:
            state["num_waited"] += 1


def plateau(state: Mapping[str, Any] | None, config: EarlyStoppingConfig) -> str | None:
    """Why a run in this state is over; none when it is not, so that more patience lets it go on."""
    if state is None or not config.enabled or state["num_evals"] < config.min_evals:
        return None
    if state["num_waited"] < config.patience:
        return None
    return (
        f"no validation loss below {state['best']!r} of step {state['best_step']} "
        f"by {config.min_delta} in {state['num_waited']} validations"
    )
