"""From logits to a token: the likeliest, or a draw from what temperature and top-p leave.

Shapes: N places, V vocabulary.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Draws come from a generator of their own, so nobody else's random numbers move on."""

    temperature: float
    top_p: float
    generator: torch.Generator
    never: Collection[int] = ()
    """Tokens that are not produced."""

    def __call__(self, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """[N] each: the token of every place, and its probability in what it was chosen from."""
        logits_NV = logits_NV.float().cpu()
        if self.never:
            logits_NV = logits_NV.index_fill(-1, torch.tensor(sorted(self.never)), -torch.inf)
        if self.temperature == 0:
            tokens_N = logits_NV.argmax(-1)
            probability_NV = logits_NV.softmax(-1)
        else:
            probability_NV = likeliest((logits_NV / self.temperature).softmax(-1), self.top_p)
            if probability_NV.isnan().any():  # of a model that has diverged: something has to be shown
                tokens_N = logits_NV.argmax(-1)
            else:
                tokens_N = torch.multinomial(probability_NV, 1, generator=self.generator).squeeze(-1)
        return tokens_N, probability_NV.gather(-1, tokens_N[:, None]).squeeze(-1)

    def one(self, logits_V: Tensor) -> int:
        """The token of a single place."""
        return int(self(logits_V[None])[0])


def likeliest(probability_NV: Tensor, top_p: float) -> Tensor:
    """The fewest tokens that together have `top_p`, as a distribution; the others have 0."""
    if top_p == 1:
        return probability_NV
    sorted_NV, order_NV = probability_NV.sort(-1, descending=True)
    likelier_NV = sorted_NV.cumsum(-1) - sorted_NV
    kept_NV = sorted_NV.masked_fill(likelier_NV >= top_p, 0)
    return torch.zeros_like(probability_NV).scatter(-1, order_NV, kept_NV / kept_NV.sum(-1, keepdim=True))
