"""Keep the examples that a model still learns from: D_t = {x : influence(x; θ_t) > threshold}.

After MobileLLM-R1 (arXiv 2509.24945). As the model improves, scores fall towards 0 and less is kept; two
rounds were enough there.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from data_handler.influence.config import SelfBoostingConfig
from data_handler.influence.datainf import DataInfCalculator
from data_handler.influence.gradients import Examples, take

logger = logging.getLogger(__name__)


class SelfBoostingFilter:
    """Filters batches by influence on the cached probes, and counts."""

    def __init__(self, calculator: DataInfCalculator, config: SelfBoostingConfig | None = None) -> None:
        self.calculator = calculator
        self.config = config or SelfBoostingConfig()
        self.num_seen = 0
        self.num_kept = 0

    def filter(
        self,
        batch: Examples,
        *,
        reference: Tensor | None = None,
        domain_weights: Mapping[str, float] | None = None,
    ) -> Examples:
        """The examples worth keeping, in their order."""
        scores = self.calculator.compute_influence(batch, reference=reference, domain_weights=domain_weights)
        mask = self.keep(scores)
        self.num_seen += mask.numel()
        self.num_kept += int(mask.sum())
        return take(batch, mask)

    def keep(self, scores: Tensor) -> Tensor:
        """[B] scores → [B] bool; a batch whose scores are not finite is kept whole, with a warning."""
        if not torch.isfinite(scores).all():
            logger.warning("influence: a batch is kept whole, its scores are not finite.")
            return torch.ones_like(scores, dtype=torch.bool)
        mask = scores > self.config.influence_threshold
        least = min(self.config.min_batch_size, scores.numel())
        if int(mask.sum()) < least:
            mask = torch.zeros_like(mask)
            mask[scores.topk(least).indices] = True
        return mask
