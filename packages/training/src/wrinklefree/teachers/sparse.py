"""A teacher's most probable tokens: what comes over a wire or from a disk, where all would be too many.

Shapes: B samples, T tokens, N = B · T of them or those asked about, C of a chunk, K most probable tokens,
V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data_handler import Batch
from wrinklefree.objectives.base import Needs
from wrinklefree.objectives.vocabulary import MAX_CHUNK_TOKENS, chunks
from wrinklefree.teachers.base import NextTokens, Teacher, TeacherStates, TopK

CHUNK_ELEMENTS = 2**25
"""Logits that are sorted at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseTeacherStates:
    """The k most probable tokens behind each token; NaN where nobody knows them, so that using them shows."""

    ids: Tensor
    """[B, T, K]."""
    log_probs: Tensor
    vocab_size: int
    layers: tuple[Tensor, ...] = ()
    relations: Mapping[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def next_tokens(self, before_N: Tensor) -> NextTokens:
        ids_NK = self.ids.flatten(0, 1).index_select(0, before_N)
        log_probs_NK = self.log_probs.flatten(0, 1).index_select(0, before_N)
        return lambda tokens: TopK(ids_NK[tokens], log_probs_NK[tokens])

    def to(self, device: torch.device) -> "SparseTeacherStates":
        return SparseTeacherStates(
            ids=self.ids.to(device),
            log_probs=self.log_probs.to(device),
            vocab_size=self.vocab_size,
        )


def most_probable(states: TeacherStates, batch: Batch, k: int) -> tuple[Tensor, Tensor]:
    """Ids and log probabilities [B, T, K] on the CPU, sorted, the most probable first."""
    size, length = batch.input_ids.shape
    num_tokens = size * length
    next_tokens = states.next_tokens(torch.arange(num_tokens, device=batch.input_ids.device))
    chunk_tokens = max(1, min(MAX_CHUNK_TOKENS, CHUNK_ELEMENTS // states.vocab_size))
    parts = []
    for tokens in chunks(num_tokens, chunk_tokens):
        known = next_tokens(tokens)
        if isinstance(known, TopK):
            assert known.ids.shape[1] == k, "who knows a top k was asked for this one"
            parts.append((known.log_probs.cpu(), known.ids.cpu()))
        else:
            values_CK, ids_CK = torch.log_softmax(known.float(), dim=-1).topk(k)
            parts.append((values_CK.cpu(), ids_CK.cpu()))
    log_probs_NK, ids_NK = (torch.cat(column) for column in zip(*parts, strict=True))
    return ids_NK.unflatten(0, (size, length)), log_probs_NK.unflatten(0, (size, length))


def kept_mass(log_probs_BTK: Tensor) -> Tensor:
    """[B, T]: the probability of the k together; NaN where they are not known."""
    return log_probs_BTK.double().exp().sum(-1)


class UndecidedTeacher(Teacher):
    """Holds k tokens for equally likely: for measuring what a step takes, without asking anybody."""

    knows_inside = False

    def __init__(self, vocab_size: int, k: int) -> None:
        self.vocab_size, self.k = vocab_size, min(k, vocab_size)

    def answer(self, batch: Batch, needs: Needs, *, excluded: int | None) -> SparseTeacherStates:
        shape, device = (*batch.labels.shape, self.k), batch.labels.device
        log_prob = -torch.tensor(float(self.vocab_size)).log()
        return SparseTeacherStates(
            ids=torch.arange(self.k, device=device).expand(shape),
            log_probs=log_prob.to(device).expand(shape),
            vocab_size=self.vocab_size,
        )
