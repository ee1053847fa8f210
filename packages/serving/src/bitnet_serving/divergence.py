"""How far apart two predictions are, where one of them is known for its most likely tokens only.

    KL(p ‖ q) = Σ p·(log p - log q) - p + q    over the tokens that q names, and one bucket for all others

Both sums of p and q are one; with them in the formula, an error in the last digit of one counts in second
order and no divergence is negative.

The bucket can only hide divergence within it, never add any. Where q names the whole vocabulary it is empty.

Shapes: P positions, V vocabulary, K named tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitnet_serving.engine import TopLogProbs

SMALLEST_MASS = 1e-6
"""Of the bucket. The engine's numbers are fp32, and so add up to one no better than that."""


def kl_to_top(log_p_PV: Tensor, top: Sequence[TopLogProbs]) -> Tensor:
    """KL(p ‖ top) in nats, for each position."""
    ids_PK, log_q_PK = as_tensors(top)
    log_p_PK = log_p_PV.gather(1, ids_PK)
    if ids_PK.shape[1] == log_p_PV.shape[1]:
        return kl(log_p_PK, log_q_PK)
    p_P1, q_P1 = (
        1 - each.exp().sum(-1, keepdim=True).clamp(max=1 - SMALLEST_MASS) for each in (log_p_PK, log_q_PK)
    )
    return kl(torch.cat([log_p_PK, p_P1.log()], dim=1), torch.cat([log_q_PK, q_P1.log()], dim=1))


def kl(log_p_PV: Tensor, log_q_PV: Tensor) -> Tensor:
    """KL(p ‖ q) in nats, for each position."""
    p_PV = log_p_PV.exp()
    return (p_PV * (log_p_PV - log_q_PV) - p_PV + log_q_PV.exp()).sum(-1)


def as_tensors(top: Sequence[TopLogProbs]) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities [P, K]."""
    ids_PK = torch.tensor([each.ids for each in top])
    return ids_PK, torch.tensor([each.log_probs for each in top], dtype=torch.float64)
