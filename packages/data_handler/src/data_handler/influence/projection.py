"""A seeded random projection of weight gradients, one small matrix on each side (LoGRA, arXiv 2405.13954).

A weight's gradient for one example is a sum of outer products, G = Σₜ rₜ cₜᵀ, and stays so under

        P_rᵀ G P_c  =  Σₜ (P_rᵀ rₜ)(P_cᵀ cₜ)ᵀ

so that G itself is never made: O(k) numbers per example. The entries of P are ±1/√k, so inner products keep
their expectation. A side that is not longer than its share of k stays as it is.

Shapes: B examples, T positions, R rows, C columns of the weight; k_r · k_c ≤ k kept.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Side:
    """Rows or columns of one weight: `size` numbers go in, `kept` come out."""

    size: int
    matrix: Tensor | None
    """[size, kept]; none leaves the side as it is."""

    @property
    def kept(self) -> int:
        return self.size if self.matrix is None else self.matrix.shape[1]

    def project(self, values: Tensor) -> Tensor:
        """[..., size] → [..., kept]."""
        return values if self.matrix is None else values @ self.matrix.to(values)

    def select(self, indices: Tensor, like: Tensor) -> Tensor:
        """What `project` makes of one-hot vectors: [...] indices → [..., kept]."""
        if self.matrix is None:
            return F.one_hot(indices, self.size).to(like)
        return F.embedding(indices, self.matrix.to(like))


@dataclass(frozen=True, slots=True)
class Projection:
    """Both sides of one weight."""

    rows: Side
    columns: Side

    @property
    def size(self) -> int:
        return self.rows.kept * self.columns.kept


def make_projection(shape: tuple[int, int], *, keep: int | None, seed: int, name: str) -> Projection:
    """The projection of the weight `name` to at most `keep` numbers, a function of its arguments alone."""
    num_rows, num_columns = shape
    if keep is None:
        return Projection(Side(num_rows, None), Side(num_columns, None))
    kept_rows = min(num_rows, math.isqrt(keep))
    kept_columns = min(num_columns, keep // kept_rows)
    kept_rows = min(num_rows, keep // kept_columns)
    rows = _side(num_rows, kept_rows, f"{seed}/{name}/rows")
    return Projection(rows, _side(num_columns, kept_columns, f"{seed}/{name}/columns"))


def _side(size: int, kept: int, key: str) -> Side:
    if kept >= size:
        return Side(size, None)
    # Made on the CPU, so that every device and every process gets the same signs.
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    )
    signs = torch.randint(0, 2, (size, kept), generator=generator, dtype=torch.int8)
    return Side(size, (signs.float() * 2 - 1) / math.sqrt(kept))
