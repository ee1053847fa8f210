"""Losses over the vocabulary without full-vocabulary logits: a few hundred tokens at a time, each chunk's
gradient taken while its logits are there.

The gradient of the sum in the hidden states ([N, D]) and in the head's parameters is ready when the forward
ends, and `backward` only scales it. So a chunk costs the three GEMMs that it costs anyway, and no more than
one chunk of float rows is alive. Losses that are wanted together share these products.

Shapes: B samples, T tokens, N tokens with a loss, C of them in a chunk, D hidden size, V vocabulary.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from data_handler import Batch
from data_handler.types import IGNORED_LABEL
from wrinklefree.objectives.base import LossSum, Objective
from wrinklefree.objectives.head import Head, accurate, open_head
from wrinklefree.objectives.states import DecoderStates, States

CHUNK_ELEMENTS = {"cpu": 2**25}
"""Logits in a chunk, by device type: 128 MiB of float32."""
CHUNK_ELEMENTS_OTHERWISE = 2**27
"""An accelerator needs larger GEMMs to be busy."""
MAX_CHUNK_TOKENS = 4096


class TokenLoss(Protocol):
    """A loss on the logits of single tokens."""

    def __call__(
        self, logits_CV: Tensor, tokens: slice, /, *, gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The sum over a chunk, which are these tokens of N, and its gradient if asked for, in new memory."""


class VocabularyObjective(Objective):
    """An objective on the distribution over the token that follows, at every token that has a label."""

    @abstractmethod
    def token_loss(self, states: States, batch: Batch, places_N: Tensor) -> TokenLoss:
        """The loss at the places of `places_with_a_label`."""

    def count(self, batch: Batch) -> int:
        return int((batch.labels[:, 1:] != IGNORED_LABEL).sum())

    def __call__(self, states: States, batch: Batch) -> LossSum:
        total, sums = vocabulary_losses([self], states, batch)
        return LossSum(total, sums[0].count)


def vocabulary_losses(
    objectives: Sequence[VocabularyObjective],
    states: States,
    batch: Batch,
    *,
    factors: Sequence[float] = (1.0,),
) -> tuple[Tensor, list[LossSum]]:
    """Σ factor · sum, with a graph, and each sum without."""
    places_N = places_with_a_label(batch.labels)
    hidden_ND = states.student.hidden.flatten(0, 1).index_select(0, places_N)
    losses = [objective.token_loss(states, batch, places_N) for objective in objectives]
    # The common factor stays out of the pass: 1 / count would drown small gradients in half precision.
    common = max(factors) or 1.0
    total, sums = weighted_sum(
        hidden_ND,
        states.student.head,
        losses,
        factors=[factor / common for factor in factors],
        chunk_tokens=_chunk_tokens(states.student),
    )
    return total * common, [LossSum(part, len(places_N)) for part in sums.unbind()]


def places_with_a_label(labels_BT: Tensor) -> Tensor:
    """[N] indices into the B · T tokens: those whose next token carries a label."""
    wanted_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
    wanted_BT[:, :-1] = labels_BT[:, 1:] != IGNORED_LABEL
    return wanted_BT.flatten().nonzero().squeeze(1)


def weighted_sum(
    hidden_ND: Tensor,
    head: Head,
    losses: Sequence[TokenLoss],
    *,
    factors: Sequence[float],
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Σ factor · sum over all N tokens, differentiable once, and the sums [losses] without a graph."""
    pass_ = _Pass(head, losses, factors, chunk_tokens)
    parameters = head.learning()
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or parameters):
        total, sums = _WeightedSum.apply(pass_, hidden_ND, *parameters)
        return total, sums
    sums, _ = pass_.run(hidden_ND, gradient=False)
    return pass_.weighted(sums), sums


@dataclass(frozen=True, slots=True)
class _Pass:
    """One pass over the chunks."""

    head: Head
    losses: Sequence[TokenLoss]
    factors: Sequence[float]
    chunk_tokens: int

    def run(self, hidden_ND: Tensor, *, gradient: bool) -> tuple[Tensor, list[Tensor]]:
        """The sums, and the gradients of their weighted sum in `hidden_ND` and the head's parameters."""
        products = open_head(self.head, hidden_ND, learns=gradient)
        gradient_ND = torch.zeros_like(hidden_ND) if gradient else None
        sums = torch.zeros(len(self.losses), dtype=accurate(hidden_ND.dtype), device=hidden_ND.device)
        for tokens in chunks(len(hidden_ND), self.chunk_tokens):
            logits_CV = products.logits(hidden_ND[tokens]).to(sums.dtype)
            gradient_CV = self._add(sums, logits_CV, tokens, gradient=gradient)
            del logits_CV
            if gradient_ND is not None and gradient_CV is not None:
                gradient_ND[tokens] = products.back(gradient_CV)
        return sums, [] if gradient_ND is None else [gradient_ND, *products.gradients]

    def weighted(self, sums: Tensor) -> Tensor:
        return torch.stack([part * factor for part, factor in zip(sums, self.factors, strict=True)]).sum()

    def _add(self, sums: Tensor, logits_CV: Tensor, tokens: slice, *, gradient: bool) -> Tensor | None:
        """Add this chunk's sums, and give the gradient of their weighted sum."""
        together: Tensor | None = None
        for place, (loss, factor) in enumerate(zip(self.losses, self.factors, strict=True)):
            part, gradient_CV = loss(logits_CV, tokens, gradient=gradient)
            sums[place] += part
            if gradient_CV is None:
                continue
            if together is None:
                together = gradient_CV if factor == 1 else gradient_CV.mul_(factor)
            else:
                together.add_(gradient_CV, alpha=factor)
        return together


class _WeightedSum(torch.autograd.Function):
    """A pass whose gradients are computed on the way forward."""

    @staticmethod
    def forward(ctx: Any, pass_: _Pass, hidden_ND: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        sums, gradients = pass_.run(hidden_ND, gradient=True)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype for tensor in (hidden_ND, *parameters)]
        ctx.mark_non_differentiable(sums)
        return pass_.weighted(sums), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        # In new memory: `retain_graph` may bring us here again.
        scaled = [
            (gradient * factor).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, *scaled


def chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Equal parts, none longer than `chunk_tokens`."""
    assert chunk_tokens >= 1
    size = math.ceil(num_tokens / max(1, math.ceil(num_tokens / chunk_tokens)))
    return (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, max(1, size)))


def _chunk_tokens(states: DecoderStates) -> int:
    """How many tokens at a time: known from shapes and device type, so that a resumed run does the same."""
    elements = CHUNK_ELEMENTS.get(states.hidden.device.type, CHUNK_ELEMENTS_OTHERWISE)
    return max(64, min(MAX_CHUNK_TOKENS, elements // states.vocab_size))
