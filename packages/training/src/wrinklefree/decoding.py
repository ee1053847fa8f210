"""How text is decoded: the choices that a person has."""

import math
from dataclasses import dataclass
from typing import Literal

from durable import UserError

Mode = Literal["ar", "diffusion"]
USUAL_NEW_TOKENS = 128
USUAL_SUB_BLOCK = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """Every field has an option of the same name in `wrinklefree generate` and `chat`."""

    mode: Mode = "ar"
    """Token after token, or block diffusion, which takes a model that was trained for it."""
    max_new_tokens: int | None = None
    """None: 128, or as many as the model has positions for."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Draws from the likeliest tokens that together have this probability."""
    seed: int = 0
    threshold: float = 0.9
    """Diffusion: all tokens with more confidence are taken together; the most confident one always is."""
    sub_block: int | None = None
    """Diffusion: so many tokens are filled in before those right of them; None: 8, or whole blocks."""
    prefix_cache: bool = True
    """Keep keys and values of what was read; without, every forward reads everything again."""

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError("max-new-tokens: too few", self.max_new_tokens, "give 1 or more")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError("temperature: no temperature", self.temperature, "give 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError("top-p: no probability", self.top_p, "give more than 0, and at most 1")
        if not 0 <= self.threshold <= 1:
            raise UserError("threshold: no probability", self.threshold, "give 0 to 1")
        if self.sub_block is not None and self.sub_block < 1:
            raise UserError("sub-block: too small", self.sub_block, "give 1 or more")

    def sub_block_of(self, block_size: int) -> int:
        """How many tokens a part of a block has; UserError where blocks have no such parts."""
        if self.sub_block is None:
            return USUAL_SUB_BLOCK if block_size % USUAL_SUB_BLOCK == 0 else block_size
        if block_size % self.sub_block != 0:
            raise UserError(
                "sub-block: does not divide the model's blocks",
                f"{self.sub_block}, they have {block_size} tokens",
                f"give a divisor of {block_size}",
            )
        return self.sub_block

    def num_new_tokens(self, num_prompt: int, longest: int | None) -> int:
        """How many tokens follow a prompt at most; UserError where the model has no positions for them."""
        if longest is not None and num_prompt >= longest:
            raise UserError(
                "prompt: longer than the model's positions",
                f"{num_prompt} tokens, the model has {longest}",
                f"give at most {longest - 1}, to leave room for an answer",
            )
        if self.max_new_tokens is None:
            return USUAL_NEW_TOKENS if longest is None else min(USUAL_NEW_TOKENS, longest - num_prompt)
        if longest is not None and num_prompt + self.max_new_tokens > longest:
            raise UserError(
                "max-new-tokens: beyond the model's positions",
                f"{self.max_new_tokens} after a prompt of {num_prompt}, the model has {longest}",
                f"give {longest - num_prompt} or less",
            )
        return self.max_new_tokens
