"""Seeded permutations that are computed, not stored: place → value in the same time for any size.

A Feistel network (Luby and Rackoff 1988) over two digits of base ⌈√size⌉; a value at or beyond `size` is sent
through again until it lands below ("cycle walking", Black and Rogaway 2002), which few of them need. Only
integer arithmetic below 2^63 is used, so the result is the same on every machine, with every numpy, and for
Python's own integers.
"""

from hashlib import blake2b
from math import isqrt
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

LARGEST_SIZE = 2**62
_ROUNDS = 6
_FEW = 16
"""Below this many places, Python's integers are faster than numpy's calls."""

_Places = TypeVar("_Places", int, NDArray[np.int64])


def key_of(*names: object) -> int:
    """A 64-bit key that stands for these names and numbers."""
    return int.from_bytes(blake2b(repr(names).encode(), digest_size=8).digest(), "little")


def permuted(places: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Where the permutation of `0 … size - 1` that `key` chooses sends these places."""
    assert 0 < size <= LARGEST_SIZE, size
    side = isqrt(size - 1) + 1
    digest = blake2b(key.to_bytes(8, "little"), digest_size=4 * _ROUNDS).digest()
    keys = [int.from_bytes(digest[4 * number :][:4], "little") for number in range(_ROUNDS)]
    if len(places) < _FEW:
        return np.array([_walked(place, size, side, keys) for place in places.tolist()], np.int64)
    values = _shuffled(places, side, keys)
    while (outside := np.flatnonzero(values >= size)).size:
        values[outside] = _shuffled(values[outside], side, keys)
    return values


def _walked(place: int, size: int, side: int, keys: list[int]) -> int:
    value = _shuffled(place, side, keys)
    while value >= size:
        value = _shuffled(value, side, keys)
    return value


def _shuffled(values: _Places, side: int, keys: list[int]) -> _Places:
    """A permutation of `0 … side² - 1`."""
    left, right = divided(values, side)
    for key in keys:
        left, right = right, divided(left + _mixed(right ^ key), side)[1]
    return left * side + right


def divided(values: _Places, by: int) -> tuple[_Places, _Places]:
    """Quotient and rest of what is 0 or more; numpy's own % is many times slower than its //."""
    quotient = values // by
    return quotient, values - quotient * by


def _mixed(bits: _Places) -> _Places:
    """A hash of 32 bits: Wellons's "lowbias32", its second factor cut to 31 bits to stay below 2^63."""
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 15)) * 0x046CA68B) & 0xFFFFFFFF
    return bits ^ (bits >> 16)
