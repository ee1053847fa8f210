"""The nearest point of the bounded simplex {w : Σ w = 1, floor ≤ w ≤ ceiling} (Euclidean projection).

It has the form clip(v − τ, floor, ceiling) with one number τ for all; Σ clip(v − τ) falls in τ and is linear
between the 2n places where a coordinate meets a bound, so τ is found exactly. (Clipping and renormalising
breaks the bounds again.)
"""

import numpy as np
from numpy.typing import NDArray

from durable import UserError

Floats = NDArray[np.float64]


def project_to_bounded_simplex(point: Floats, floor: float | Floats, ceiling: float | Floats) -> Floats:
    """[n] → [n]."""
    low = np.broadcast_to(np.asarray(floor, dtype=np.float64), point.shape)
    high = np.broadcast_to(np.asarray(ceiling, dtype=np.float64), point.shape)
    if not np.isfinite(point).all():
        raise ValueError(f"Cannot project {point}: not finite.")
    if (low > high).any() or low.sum() > 1 + 1e-12 or high.sum() < 1 - 1e-12:
        raise UserError(
            "influence.mixture: no weights fit between min_weight and max_weight",
            found=f"{point.size} sources, floors adding up to {low.sum():.3g}, ceilings to {high.sum():.3g}",
            fix="lower min_weight or raise max_weight, so that floors add up to ≤ 1 and ceilings to ≥ 1",
        )
    # At knots[i] the sum is sums[i]; both run over the same order, and the sum falls.
    knots = np.unique(np.concatenate([point - high, point - low]))
    sums = np.clip(point - knots[:, None], low, high).sum(axis=1)
    tau = float(np.interp(-1.0, -sums, knots))
    weights = np.clip(point - tau, low, high)
    free = (weights > low) & (weights < high)
    if free.any():  # what rounding left over
        weights[free] += (1.0 - weights.sum()) / free.sum()
    result: Floats = np.clip(weights, low, high)
    return result
