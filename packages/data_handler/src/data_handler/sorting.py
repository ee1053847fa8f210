"""A generated task that a tiny decoder can learn exactly: sort eight digits, `31415926>11234569`.

Every sample is a pure function of (seed, sample index): no state, no cursor, no file. The order of the 10^8
questions is a permutation (a Feistel network over two four-digit halves, Luby and Rackoff 1988), so none
occurs twice, and the indices from `HELD_OUT` on are questions that training on lower ones has never shown.

Shapes: B samples, T = 18 tokens: eight digits, `>`, the digits sorted, newline.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHARACTERS = "0123456789>\n"
"""The vocabulary: the id of a character is its place here."""
NUM_DIGITS = 8
PROMPT_LENGTH = NUM_DIGITS + 1
ANSWER_LENGTH = NUM_DIGITS + 1
NUM_SAMPLES = 10**NUM_DIGITS
HELD_OUT = NUM_SAMPLES - 1_000_000
"""The first sample index that training leaves alone."""
IGNORED_LABEL = -100

_HALF = 10 ** (NUM_DIGITS // 2)
_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples for a decoder, as transformers takes them: labels unshifted, -100 where no loss is wanted."""

    input_ids: Tensor
    """[B, T] int64."""
    labels: Tensor
    """[B, T] int64: the answer and its newline; the question is ignored."""
    sample_id: Tensor
    """[B] int64: the index of each sample."""


def encode(text: str) -> list[int]:
    """Token ids of a text in `CHARACTERS`."""
    unknown = sorted(set(text) - set(CHARACTERS))
    if unknown:
        raise ValueError(f"Cannot encode {unknown[0]!r}: the sorting task knows {CHARACTERS!r} only.")
    return [CHARACTERS.index(character) for character in text]


def decode(token_ids: list[int]) -> str:
    """The text of token ids."""
    return "".join(CHARACTERS[token_id] for token_id in token_ids)


def sorting_batch(seed: int, first_index: int, count: int) -> Batch:
    """Samples `first_index … first_index + count - 1` of the stream that `seed` names."""
    if first_index < 0 or count < 1 or first_index + count > NUM_SAMPLES:
        raise ValueError(
            f"Cannot make {count} samples from index {first_index}: "
            f"a stream has samples 0 to {NUM_SAMPLES - 1}, each once."
        )
    sample_id = torch.arange(first_index, first_index + count)
    digits = _digits(_permuted(sample_id, seed))
    separator = torch.full((count, 1), CHARACTERS.index(">"))
    newline = torch.full((count, 1), CHARACTERS.index("\n"))
    input_ids = torch.cat([digits, separator, digits.sort(dim=-1).values, newline], dim=-1)
    labels = input_ids.clone()
    labels[:, :PROMPT_LENGTH] = IGNORED_LABEL
    return Batch(input_ids, labels, sample_id)


def _digits(numbers: Tensor) -> Tensor:
    """[B] → [B, 8], most significant first."""
    powers = 10 ** torch.arange(NUM_DIGITS - 1, -1, -1)
    digits: Tensor = numbers[:, None] // powers % 10
    return digits


def _permuted(numbers: Tensor, seed: int) -> Tensor:
    """A permutation of 0 … 10^8 - 1 that `seed` chooses."""
    left, right = numbers // _HALF, numbers % _HALF
    for round_number in range(_ROUNDS):
        left, right = right, (left + _mixed(right, seed * _ROUNDS + round_number) % _HALF) % _HALF
    permuted: Tensor = left * _HALF + right
    return permuted


def _mixed(numbers: Tensor, key: int) -> Tensor:
    """A non-negative hash of (key, number): the finaliser of SplitMix64, whose products wrap on purpose."""
    bits = numbers + _wrapped((key + 1) * 0x9E3779B97F4A7C15)
    bits = (bits ^ _shifted(bits, 30)) * _wrapped(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shifted(bits, 27)) * _wrapped(0x94D049BB133111EB)
    return _shifted(bits ^ _shifted(bits, 31), 1)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Shift right without copying the sign."""
    shifted: Tensor = (bits >> places) & ((1 << (64 - places)) - 1)
    return shifted


def _wrapped(value: int) -> int:
    """The signed 64-bit integer with the same bits."""
    return (value + 2**63) % 2**64 - 2**63
