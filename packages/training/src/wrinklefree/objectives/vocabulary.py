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
from typing import Any, ClassVar, Protocol

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


@dataclass(frozen=True, slots=True)
class Places:
    """The N tokens that a loss is about, each predicted by the hidden state one before it."""

    before: Tensor
    """[N]: of those hidden states: which of the B · T tokens they belong to."""
    targets: Tensor
    """[N]: ids of the tokens that are predicted."""
    hidden: Tensor
    """[N, D]: the student's."""
    probability: Tensor | None = None
    """[N]: with which a token was masked; none among clean tokens."""

    def __len__(self) -> int:
        return len(self.before)


class VocabularyObjective(Objective):
    """An objective on the distribution over a token: the one that follows, or the one under a mask."""

    of_masked: ClassVar[bool] = False
    """About masked tokens, in the masked views; else about all that have a label."""

    @abstractmethod
    def token_loss(self, states: States, batch: Batch, places: Places) -> TokenLoss:
        """The loss at these places."""

    def beside(self, states: States, batch: Batch) -> Tensor | None:
        """What the objective adds that is not about the vocabulary: a sum over the same tokens."""
        return None

    def count(self, batch: Batch) -> int:
        return int(predicting(batch.labels).sum())

    def __call__(self, states: States, batch: Batch) -> LossSum:
        total, _ = vocabulary_losses([self], states, batch)
        return LossSum(total, self.count(batch))


def vocabulary_losses(
    objectives: Sequence[VocabularyObjective],
    states: States,
    batch: Batch,
    *,
    factors: Sequence[float] = (1.0,),
) -> tuple[Tensor, Tensor]:
    """Σ factor · sum, with a graph, and the sums without."""
    # The common factor stays out of the pass: 1 / count would drown small gradients in half precision.
    common = max(factors) or 1.0
    groups, hidden = [], []
    for of_masked in (False, True):
        members = [number for number, each in enumerate(objectives) if each.of_masked == of_masked]
        if not members:
            continue
        places = masked_places(states, batch) if of_masked else clean_places(states, batch)
        hidden.append(places.hidden)
        groups.append(
            Group(
                num_tokens=len(places),
                losses=[objectives[number].token_loss(states, batch, places) for number in members],
                factors=[factors[number] / common for number in members],
                members=members,
            )
        )
    total, sums = weighted_sum(
        torch.cat(hidden) if len(hidden) > 1 else hidden[0],
        states.student.head,
        groups,
        chunk_tokens=_chunk_tokens(states.student),
    )
    total = total * common
    for number, objective in enumerate(objectives):
        part = objective.beside(states, batch)
        if part is not None:
            total = total + factors[number] * part
            sums[number] += part.detach()
    return total, sums


def predicting(labels_BT: Tensor) -> Tensor:
    """[B, T] boolean: tokens whose next one has a label."""
    wanted_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
    wanted_BT[:, :-1] = labels_BT[:, 1:] != IGNORED_LABEL
    return wanted_BT


def clean_places(states: States, batch: Batch) -> Places:
    """All tokens with a label, in the clean part."""
    before_N = predicting(batch.labels).flatten().nonzero().squeeze(1)
    return Places(before_N, batch.labels.flatten()[before_N + 1], states.student.rows(before_N))


def masked_places(states: States, batch: Batch) -> Places:
    """The masked tokens of every view, one view after the other."""
    views = states.views
    assert views is not None, "the manager draws views where they are needed"
    # The first token of a sample is the first of a block, and so never masked.
    before = [masked.flatten().nonzero().squeeze(1) - 1 for masked in views.masked]
    hidden = [states.student.rows(places, part) for part, places in enumerate(before, start=1)]
    probability = [each.flatten()[places + 1] for each, places in zip(views.probability, before, strict=True)]
    before_N = torch.cat(before)
    targets_N = batch.input_ids.flatten()[before_N + 1]
    return Places(before_N, targets_N, torch.cat(hidden), torch.cat(probability))


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Losses on the same tokens."""

    num_tokens: int
    losses: Sequence[TokenLoss]
    factors: Sequence[float]
    members: Sequence[int]
    """Where their sums belong."""


def weighted_sum(
    hidden_ND: Tensor, head: Head, groups: Sequence[Group], *, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Σ factor · sum, differentiable once, and the sums [losses] without a graph.

    `hidden_ND` holds the tokens of one group after those of the other.
    """
    pass_ = _Pass(head, groups, chunk_tokens)
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
    groups: Sequence[Group]
    chunk_tokens: int

    def run(self, hidden_ND: Tensor, *, gradient: bool) -> tuple[Tensor, list[Tensor]]:
        """The sums, and the gradients of their weighted sum in `hidden_ND` and the head's parameters."""
        products = open_head(self.head, hidden_ND, learns=gradient)
        gradient_ND = torch.zeros_like(hidden_ND) if gradient else None
        num_losses = sum(len(group.losses) for group in self.groups)
        sums = torch.zeros(num_losses, dtype=accurate(hidden_ND.dtype), device=hidden_ND.device)
        start = 0
        for group in self.groups:
            for tokens in chunks(group.num_tokens, self.chunk_tokens):
                here = slice(start + tokens.start, start + tokens.stop)
                logits_CV = products.logits(hidden_ND[here]).to(sums.dtype)
                gradient_CV = _add(group, sums, logits_CV, tokens, gradient=gradient)
                del logits_CV
                if gradient_ND is not None and gradient_CV is not None:
                    gradient_ND[here] = products.back(gradient_CV)
            start += group.num_tokens
        return sums, [] if gradient_ND is None else [gradient_ND, *products.gradients]

    def weighted(self, sums: Tensor) -> Tensor:
        """Σ factor · sum."""
        parts = [
            sums[place] * factor
            for group in self.groups
            for place, factor in zip(group.members, group.factors, strict=True)
        ]
        return torch.stack(parts).sum()


def _add(group: Group, sums: Tensor, logits_CV: Tensor, tokens: slice, *, gradient: bool) -> Tensor | None:
    """Add this chunk's sums, and give the gradient of their weighted sum."""
    together: Tensor | None = None
    for place, loss, factor in zip(group.members, group.losses, group.factors, strict=True):
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
