"""Measures how strongly each objective pulls, warns of one that drowns others, and balances if asked to."""

import logging
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from data_handler import Batch
from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.objectives.balance import (
    TOO_STRONG,
    BalanceConfig,
    BalanceMode,
    balanced_scales,
    gradient_norms,
    reference_of,
)
from wrinklefree.training.compiling import without_compiled_blocks
from wrinklefree.training.metrics import MetricsWriter
from wrinklefree.training.randomness import seed_micro_batch

logger = logging.getLogger(__name__)


class BalanceCallback(pl.Callback):
    """Every so many steps, and when other objectives are active than before: before the step, on its first
    micro-batch. All ranks measure alike.
    """

    def __init__(self, config: BalanceConfig, writer: MetricsWriter | None) -> None:
        self.config = config
        self.writer = writer
        self.scales: dict[str, float] = {}
        self.strong_since: dict[str, int] = {}
        """Objective → first step at which it pulled too strongly, and has since."""
        self.measured: list[str] = []
        """Objectives of the last measurement."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "scales": dict(self.scales),
            "strong_since": dict(self.strong_since),
            "measured": list(self.measured),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scales, self.strong_since = dict(state["scales"]), dict(state["strong_since"])
        self.measured = list(state["measured"])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: list[Batch], batch_idx: int
    ) -> None:
        assert isinstance(pl_module, WrinkleFreeLightningModule)
        manager, step = pl_module.objective_manager, pl_module.progress.step
        manager.scales = self.scales if self.config.mode is BalanceMode.gradnorm else {}
        interval = self.config.interval
        active = list(manager.active)
        is_due = interval is not None and (step % interval == 0 or active != self.measured)
        if not is_due or len(active) < 2:
            return
        self.measured = active
        # The step itself draws the same numbers again.
        seed_micro_batch(pl_module.seed, step=step, micro_batch=0, rank=pl_module.global_rank)
        first = manager.preprocess_batch(batch[0])
        # Callbacks run outside the step's autocast: in float32 this would need twice the step's memory.
        with without_compiled_blocks(pl_module.model), trainer.precision_plugin.train_step_context():
            norms = gradient_norms(manager, pl_module.model, pl_module.teacher, first)
        norms = _mean_of_ranks(norms, pl_module.device)
        if self.config.mode is BalanceMode.gradnorm:
            manager.scales = self.scales = balanced_scales(norms, self.scales)
        self._report(norms, manager.weights, manager.scales, step + 1)

    def _report(
        self, norms: dict[str, float], weights: dict[str, float], scales: dict[str, float], step: int
    ) -> None:
        reference = reference_of(norms)
        pulls = {name: norm * weights[name] * scales.get(name, 1.0) for name, norm in norms.items()}
        unit = pulls[reference]
        ratios = {name: pull / unit if unit else 0.0 for name, pull in pulls.items()}
        if self.writer is not None:
            row = {"step": step, "norms": norms, "ratios": ratios, "scales": dict(scales)}
            self.writer.write("gradients", row)
        for name, ratio in ratios.items():
            if not ratio > TOO_STRONG:  # NaN is the business of whoever skips the step
                self.strong_since.pop(name, None)
                continue
            since = self.strong_since.setdefault(name, step)
            if step - since >= self.config.warn_steps:
                self.strong_since[name] = step  # and not again before so many more
                logger.warning(
                    "%s pulls %.0f × as strongly as %s, since step %d: lower training.objectives.%s.weight "
                    "(now %g), or set training.balance.mode=gradnorm",
                    name, ratio, reference, since, name, weights[name],
                )  # fmt: skip


def _mean_of_ranks(norms: dict[str, float], device: torch.device) -> dict[str, float]:
    if not (dist.is_available() and dist.is_initialized()):
        return norms
    values = torch.tensor(list(norms.values()), dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return dict(zip(norms, (values / dist.get_world_size()).tolist(), strict=True))
