"""The closed forms of Low-Rank Correction (LRC, arXiv 2412.07902), in float64.

A ternary layer multiplies quantised inputs Y = Q(X) with Ŵ. Its correction sees X itself. Wanted is

    min over codes, U, V   ‖ W X - Ŵ Y - U Vᵀ X ‖²          U [N, r], V [K, r]

which depends on the data only through X Xᵀ, X Yᵀ and Y Yᵀ. Two steps each solve for one half:

    (b)  B = (W X - Ŵ Y) Xᵀ (X Xᵀ)⁻¹,  U = top r eigenvectors of B (X Xᵀ) Bᵀ,  V = Bᵀ U     the exact minimum
    (a)  Ŵ = round( (W - U Vᵀ) X Yᵀ (Y Yᵀ)⁻¹ ),  column by column, errors passed on (GPTQ, arXiv 2210.17323)

Step (b) cannot raise the objective. Rounding in (a) is greedy and can; the best of all rounds is kept.

Shapes: N out_features, K in_features, T tokens, r rank; X and Y [K, T], given to `add` as rows [T, K].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet_arch.quant import EPS, quantize_weight

DAMPING = 0.01
"""Share of the mean energy of a channel that every channel gets in addition. See `InputStatistics.damped`."""

SCALE_FACTORS = (1.0, 1.25, 1.5, 1.75)
"""Scales that step (a) tries, over mean|W|. Measured: with errors passed on, 1.5 halves what 1 leaves."""


@dataclass
class InputStatistics:
    """What the closed forms need to know about a layer's inputs: three sums over tokens."""

    xx: Tensor
    xy: Tensor
    yy: Tensor
    num_tokens: int = 0

    @classmethod
    def empty(cls, in_features: int, device: torch.device | str = "cpu") -> "InputStatistics":
        xx, xy, yy = torch.zeros(3, in_features, in_features, dtype=torch.float64, device=device)
        return cls(xx, xy, yy)

    def add(self, x_TK: Tensor, y_TK: Tensor) -> None:
        """Take in more tokens: the input x, and what quantisation makes of it."""
        x, y = x_TK.to(self.xx), y_TK.to(self.xx)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.yy.addmm_(y.T, y)
        self.num_tokens += len(x)

    def damped(self, share: float = DAMPING) -> "InputStatistics":
        """As if every channel had in addition been seen alone, exact, with a little energy.

        Channels that the batches never used keep their weights, and every inverse exists.
        """
        mean_energy = self.xx.diagonal().mean()
        extra = (share * mean_energy).clamp(min=1e-30) * torch.eye(len(self.xx)).to(self.xx)
        return InputStatistics(self.xx + extra, self.xy + extra, self.yy + extra, self.num_tokens)


@dataclass(frozen=True)
class LowRankFit:
    """A correction, the codes that it belongs to, and how good both are."""

    U: Tensor
    V: Tensor
    weight: Tensor
    """A latent weight whose codes are Ŵ: the given one, unless step (a) found better codes."""
    objective: float


def solve(weight: Tensor, statistics: InputStatistics, rank: int, *, rounds: int = 0) -> LowRankFit:
    """Step (b) for the codes that `weight` has; then `rounds` times (a) and (b). The best is kept."""
    target = weight.detach().double()
    best = fit = _fit(target, weight, statistics, rank)
    for _ in range(rounds):
        better = requantized(target - fit.U @ fit.V.T, statistics, weight.dtype)
        fit = _fit(target, better, statistics, rank)
        best = min(best, fit, key=lambda found: found.objective)
    return best


def _fit(target: Tensor, weight: Tensor, statistics: InputStatistics, rank: int) -> LowRankFit:
    codes_value = ternary_value(weight)
    U, V = best_correction(target, codes_value, statistics, rank)
    return LowRankFit(U, V, weight, objective(target, codes_value, U @ V.T, statistics))


def objective(target: Tensor, codes_value: Tensor, correction: Tensor, statistics: InputStatistics) -> float:
    """‖ W X - Ŵ Y - M X ‖² for M = U Vᵀ, from the sums alone."""
    kept = target - correction
    squares = kept @ statistics.xx * kept - 2 * (kept @ statistics.xy) * codes_value
    return float((squares + codes_value @ statistics.yy * codes_value).sum())


def best_correction(
    target: Tensor, codes_value: Tensor, statistics: InputStatistics, rank: int
) -> tuple[Tensor, Tensor]:
    """Step (b): the U, V of this rank that minimise the objective for given codes."""
    wanted = target @ statistics.xx - codes_value @ statistics.xy.T
    half = torch.linalg.cholesky(statistics.xx)
    full = torch.cholesky_solve(wanted.T, half).T
    return _balanced(full, _left_vectors(full @ half, rank))


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The U, V of this rank with U Vᵀ closest to `matrix`: step (b) without any data."""
    matrix = matrix.double()
    return _balanced(matrix, _left_vectors(matrix, rank))


def requantized(target: Tensor, statistics: InputStatistics, dtype: torch.dtype) -> Tensor:
    """Step (a): a latent weight whose codes times Y come close to target · X."""
    half = torch.linalg.cholesky(statistics.yy)
    continuous = torch.cholesky_solve((target @ statistics.xy).T, half).T
    scale = quantize_weight(continuous.float()).scale.double()
    tried = [continuous / (scale * factor) for factor in SCALE_FACTORS]
    codes_of_all = _gptq_codes(torch.cat(tried), statistics.yy).chunk(len(tried))
    candidates = [_scaled(codes, continuous, statistics) for codes in codes_of_all]
    return max(candidates, key=lambda candidate: candidate[0])[1].to(dtype)


def _scaled(codes: Tensor, continuous: Tensor, statistics: InputStatistics) -> tuple[float, Tensor]:
    """How much of the product these codes explain at their best scale, and the latent weight with both.

    The best scale is a quotient of two inner products. The latent weight has it as its mean magnitude, and
    every entry of it that is not zero rounds away from zero.
    """
    energy = codes @ statistics.yy
    common, own = (energy * continuous).sum(), (energy * codes).sum().clamp(min=1e-300)
    share_used = codes.abs().mean().clamp(min=1 / codes.numel())
    return float(common.square() / own), codes * (common / own).clamp(min=EPS) / share_used


def ternary_value(weight: Tensor) -> Tensor:
    """What the layer multiplies with, in float64."""
    codes, scale = quantize_weight(weight)
    return codes.double() * scale.double()


def _gptq_codes(weight: Tensor, hessian: Tensor, block: int = 128) -> Tensor:
    """Round column after column to {-1, 0, 1}; those to come make good what they can of each error."""
    # The busiest channels first: their errors matter most, and the most columns are left to make them good.
    order = hessian.diagonal().argsort(descending=True)
    remaining, hessian = weight[:, order], hessian[order][:, order]
    codes = torch.zeros_like(weight)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    spread = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, weight.shape[1], block):
        end = min(start + block, weight.shape[1])
        errors = torch.zeros_like(weight[:, start:end])
        for k in range(start, end):
            codes[:, k] = remaining[:, k].round().clamp(-1, 1)
            error = (remaining[:, k] - codes[:, k]) / spread[k, k]
            remaining[:, k:end] -= error[:, None] * spread[k, k:end]
            errors[:, k - start] = error
        remaining[:, end:] -= errors @ spread[start:end, end:]
    return codes[:, order.argsort()]


def _left_vectors(matrix: Tensor, rank: int) -> Tensor:
    """The first `rank` left singular vectors, by the smaller of the two Gram matrices."""
    num_rows, num_columns = matrix.shape
    if num_rows <= num_columns:
        return _top_eigenvectors(matrix @ matrix.T, rank)
    left: Tensor = torch.linalg.qr(matrix @ _top_eigenvectors(matrix.T @ matrix, rank)).Q
    return left


def _top_eigenvectors(symmetric: Tensor, rank: int) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors
    return vectors[:, -rank:].flip(-1)


def _balanced(matrix: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """U Vᵀ = left leftᵀ matrix, with columns of U and V of equal length, so that both learn at the same pace.

    Where nothing is left to correct V is zero and U is not: such a column still has a gradient.
    """
    V = matrix.T @ left
    length = V.norm(dim=0)
    root = torch.where(length > 1e-12 * length.max().clamp(min=1e-30), length, 1.0).sqrt()
    return left * root, V / root
