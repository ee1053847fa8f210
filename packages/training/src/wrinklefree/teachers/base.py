"""What an objective is told by a teacher, wherever it runs.

Shapes: B samples, T tokens, N tokens that are asked about, C of them in a chunk, K most probable tokens,
V vocabulary, D hidden size.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from data_handler import Batch
from wrinklefree.objectives.base import Needs


@dataclass(frozen=True, slots=True)
class TopK:
    """The most probable tokens and their natural log probabilities; the rest is known by its mass alone."""

    ids: Tensor
    """[C, K]."""
    log_probs: Tensor


class NextTokens(Protocol):
    """The distribution over the token that follows, for some of the N tokens: logits, or a top k."""

    def __call__(self, tokens: slice, /) -> Tensor | TopK: ...


class TeacherStates(Protocol):
    """What a teacher says of a batch."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def layers(self) -> tuple[Tensor, ...]:
        """[B, T, D] each; empty where nobody asked."""

    @property
    def relations(self) -> Mapping[int, tuple[Tensor, Tensor, Tensor]]:
        """Layer → queries, keys, values."""

    def next_tokens(self, before_N: Tensor) -> NextTokens:
        """Of these of the B · T tokens."""


class Teacher(ABC):
    """A decoder that is only asked."""

    knows_inside: ClassVar[bool]
    """Can it be asked for hidden states and attention?"""

    @abstractmethod
    def states(self, batch: Batch, needs: Needs, *, excluded: int | None = None) -> TeacherStates:
        """What is needed, of the clean tokens. `excluded` is a token that gets no probability, [MASK]."""

    def to(self, device: torch.device | str) -> None:  # noqa: B027 - only what runs here has to move
        """Move to where the student is."""

    def close(self) -> None:  # noqa: B027 - only some hold anything
        """Let go of what it holds."""
