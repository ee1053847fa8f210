"""What a configuration says of block diffusion."""

from dataclasses import dataclass
from enum import StrEnum

from wrinklefree.objectives.base import is_number, require
from wrinklefree.objectives.views import ViewPlan

ON_MASKED_TOKENS = ("dlm", "tcs_distill")
"""Objectives that need masked views."""


class ViewAttention(StrEnum):
    """Who looks at whom in masked views."""

    block = "block"
    causal = "causal"


@dataclass(kw_only=True)
class DiffusionConfig:
    """Block diffusion: what objectives on masked tokens have in common, and what generation has to know."""

    block_size: int = 32
    """Tokens of a block, which is filled in together."""
    mask_token_id: int | None = None
    """[MASK]; none takes the tokenizer's, or adds a row behind the vocabulary."""
    complementary: bool = True
    """Two views that together mask every token once; off runs one view, at half the cost."""
    mask_prob: float | None = None
    """Share of tokens that the first view masks; none draws it for every block, evenly between 0 and 1."""
    attention: ViewAttention = ViewAttention.block
    """`causal` is for attention that takes no other mask: views run alone and see no clean block before."""

    def __post_init__(self) -> None:
        key = "training.diffusion"
        size, mask, share = self.block_size, self.mask_token_id, self.mask_prob
        require(size >= 2, f"{key}.block_size", "must be 2 or more", size)
        require(mask is None or mask >= 0, f"{key}.mask_token_id", "must be 0 or more", mask)
        in_range = share is None or (is_number(share, at_least=0) and share <= 1)
        require(in_range, f"{key}.mask_prob", "must be 0 to 1", share)
        masks = self.complementary or share != 0
        require(masks, f"{key}.mask_prob", "must be above 0 where one view runs", share)

    def plan(self, seed: int) -> "ViewPlan":
        """How a run with this seed draws its views."""
        return ViewPlan(
            block_size=self.block_size,
            complementary=self.complementary,
            mask_prob=self.mask_prob,
            causal=self.attention == ViewAttention.causal,
            seed=seed,
        )
