"""What an objective is told by a teacher, wherever it runs.

Shapes: B samples, T tokens, N tokens that are asked about, C of them in a chunk, K most probable tokens,
V vocabulary, D hidden size.
"""

import time
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
    seconds: float = 0.0
    """Spent in `states` since `take_seconds`."""

    def states(self, batch: Batch, needs: Needs, *, excluded: int | None = None) -> TeacherStates:
        """What is needed, of the clean tokens. `excluded` is a token that gets no probability, [MASK]."""
        started = time.perf_counter()
        try:
            return self.answer(batch, needs, excluded=excluded)
        finally:
            self.seconds += time.perf_counter() - started

    @abstractmethod
    def answer(self, batch: Batch, needs: Needs, *, excluded: int | None) -> TeacherStates:
        """`states`, without the clock."""

    def take_seconds(self) -> float:
        """How long `states` took since the last time somebody asked."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def take_numbers(self) -> dict[str, float]:
        """For the row of the step that has just been made."""
        return {}

    def rehearsing(self) -> "Teacher":
        """One that takes about as much memory and is told made-up tokens, so nobody outside may be asked."""
        return self

    def to(self, device: torch.device | str) -> None:  # noqa: B027 - only what runs here has to move
        """Move to where the student is."""

    def flush(self) -> None:  # noqa: B027 - only some write
        """What it writes is on disk afterwards: called before a checkpoint."""

    def close(self) -> None:  # noqa: B027 - only some hold anything
        """Let go of what it holds."""
