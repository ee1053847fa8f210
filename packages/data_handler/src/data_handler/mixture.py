"""Which source sample `n` comes from, and which of that source's samples it is: a function, not a history.

Samples come in windows of W. At the end of every window, the samples drawn from each source so far are the
largest-remainder apportionment (Hamilton's) of n·w: whole numbers that add up to n, each within one of n·w.
A window holds the difference of two such counts, in an order that (seed, window) permutes:

    n ─► window k = n // W, place n % W ─► permuted slot ─► source whose stretch of slots holds it
                      counts at k and k + 1 ────────────────┘   index = count at k + slot in the stretch

Nothing before window k is looked at. Counts cannot fall (the Alabama paradox) as each positive weight is
worth one sample a window at least; smaller ones are refused. New weights begin with the next window and take
over what the old ones left each source owed, unless sources were opened or closed; then the count starts
afresh.
Arithmetic is exact: weights are the decimal fractions that their writer sees.
"""

import bisect
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_handler.permutation import key_of, permuted
from durable import ExitCode, UserError

logger = logging.getLogger(__name__)

_UNIT = 2**64
"""What a source is owed is kept in whole parts of this size, or its fractions would grow with each change."""


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Samples `start …` under one set of weights."""

    start: int
    weights: dict[str, float]
    shares: tuple[int, ...]
    """The weights, as whole numbers."""
    base: tuple[int, ...]
    """Samples drawn from each source before `start`."""
    owed: tuple[int, ...]
    """What each source's weights were worth before `start`, less what was drawn; in units, of sum 0."""

    def counts(self, num_samples: int) -> list[int]:
        """Samples drawn from each source after `num_samples` (whole windows) of this stretch."""
        if num_samples == 0:
            return list(self.base)
        total, new = sum(self.shares), num_samples * _UNIT
        worth = [
            divmod(owed * total + share * new, total * _UNIT)
            for owed, share in zip(self.owed, self.shares, strict=True)
        ]
        counts = [quotient for quotient, _ in worth]
        by_remainder = sorted(range(len(worth)), key=lambda source: -worth[source][1])
        for source in by_remainder[: num_samples - sum(counts)]:
            counts[source] += 1
        return [base + count for base, count in zip(self.base, counts, strict=True)]

    def owed_after(self, num_samples: int) -> tuple[int, ...]:
        """What each source is owed then; rounded towards zero, but for one source that keeps the sum at 0."""
        total, counts = sum(self.shares), self.counts(num_samples)
        exact = [
            Fraction(num_samples * share * _UNIT, total) + owed + (base - count) * _UNIT
            for share, owed, base, count in zip(self.shares, self.owed, self.base, counts, strict=True)
        ]
        owed = [math.trunc(value) for value in exact]
        owed[min(range(len(owed)), key=lambda source: (not self.shares[source], abs(owed[source])))] -= sum(
            owed
        )
        return tuple(owed)


class MixtureSchedule:
    """The order of a mixture of sources; see the top of this file.

    The state is the seed, the window and the list of (first sample, weights).
    """

    def __init__(self, weights: Mapping[str, float], seed: int, window_samples: int = 1024) -> None:
        if window_samples < 1:
            raise UserError("data.window_samples: must be 1 or more", window_samples, "use 1024")
        self.names = tuple(weights)
        self.seed = seed
        self.window_samples = window_samples
        self._stretches: list[_Stretch] = []
        self._append(0, weights)

    def locate(self, sample: int) -> tuple[str, int]:
        """The source of a sample, and which of that source's samples it is."""
        window, place = divmod(sample, self.window_samples)
        source, index = self._located(window, np.array([place]))
        return self.names[int(source[0])], int(index[0])

    def window(
        self, number: int, places: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Samples of a window, all or those at `places`: where their sources are in `names`, and indices."""
        return self._located(number, np.arange(self.window_samples) if places is None else places)

    def counts(self, num_samples: int) -> dict[str, int]:
        """How many of the first `num_samples` come from each source."""
        window, rest = divmod(num_samples, self.window_samples)
        before = self._counts(window)
        if rest:
            sources, _ = self._located(window, np.arange(rest))
            drawn = np.bincount(sources, minlength=len(self.names)).tolist()
            before = [count + more for count, more in zip(before, drawn, strict=True)]
        return dict(zip(self.names, before, strict=True))

    def weights(self, sample: int) -> dict[str, float]:
        """The weights in force at a sample; they add up to 1."""
        given = self._stretch_of(sample // self.window_samples).weights
        total = math.fsum(given.values())
        return {name: weight / total for name, weight in given.items()}

    def reweight(self, sample: int, weights: Mapping[str, float]) -> int:
        """New weights, from the window after the one that holds `sample`; returns its first sample."""
        start = (sample // self.window_samples + 1) * self.window_samples
        if self._stretches[-1].start > start:
            raise ValueError(f"Weights change already at sample {self._stretches[-1].start}, after {start}.")
        if weights.keys() != set(self.names):
            unknown = sorted(weights.keys() ^ set(self.names))
            raise UserError("data.weights: name each source once", unknown[0], choices=self.names)
        replaced = [self._stretches.pop()] if self._stretches[-1].start == start else []
        try:
            self._append(start, weights)
        except UserError:
            self._stretches += replaced
            raise
        return start

    def state_dict(self) -> dict[str, Any]:
        """What json keeps of this schedule."""
        history = [[stretch.start, dict(stretch.weights)] for stretch in self._stretches]
        return {"seed": self.seed, "window_samples": self.window_samples, "history": history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a history; UserError when it is that of another seed, window or set of sources."""
        try:
            history = [(int(start), dict(weights)) for start, weights in state["history"]]
            others = {"seed": state["seed"], "window_samples": state["window_samples"]}
            names = list(history[0][1])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise _bad_state(f"no seed, window_samples and history ({error!r})") from None
        others["sources"] = names
        for key, value in self._identity().items():
            if others[key] != value:
                raise UserError(
                    f"data.{key}: the run to resume had {others[key]}",
                    value,
                    "use that, or start another run",
                )
        self._replay(history)

    def _replay(self, history: list[tuple[int, dict[str, float]]]) -> None:
        starts = [start for start, _ in history]
        aligned = all(start % self.window_samples == 0 for start in starts)
        if starts[0] != 0 or starts != sorted(set(starts)) or not aligned:
            raise _bad_state(f"weights that change at {starts[:8]}")
        previous, self._stretches = self._stretches, []
        try:
            for start, weights in history:
                if weights.keys() != set(self.names):
                    raise _bad_state(f"weights for {', '.join(weights)}")
                self._append(start, weights)
        except UserError:
            self._stretches = previous
            raise

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "window_samples": self.window_samples, "sources": list(self.names)}

    def _append(self, start: int, weights: Mapping[str, float]) -> None:
        ordered = {name: weights[name] for name in self.names}
        shares = _whole_shares(ordered, self.window_samples)
        base, owed = (0,) * len(shares), (0,) * len(shares)
        if self._stretches:
            last = self._stretches[-1]
            base = tuple(last.counts(start - last.start))
            if [share > 0 for share in shares] == [share > 0 for share in last.shares]:
                owed = last.owed_after(start - last.start)
        self._stretches.append(_Stretch(start, ordered, shares, base, owed))

    def _stretch_of(self, window: int) -> _Stretch:
        first = window * self.window_samples
        return self._stretches[bisect.bisect_right(self._stretches, first, key=lambda s: s.start) - 1]

    def _counts(self, window: int) -> list[int]:
        stretch = self._stretch_of(window)
        return stretch.counts(window * self.window_samples - stretch.start)

    def _located(self, window: int, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        stretch = self._stretch_of(window)
        done = window * self.window_samples - stretch.start
        before = np.array(stretch.counts(done))
        ends = np.cumsum(np.array(stretch.counts(done + self.window_samples)) - before)
        slots = permuted(places, self.window_samples, key_of("window", self.seed, window))
        source = np.searchsorted(ends, slots, side="right")
        begins = np.concatenate([[0], ends[:-1]])
        return source, before[source] + slots - begins[source]


def _whole_shares(weights: Mapping[str, float], window_samples: int) -> tuple[int, ...]:
    """The weights as whole numbers in the same proportion, after checking them."""
    if not weights:
        raise UserError("data.weights: there is no source", fix="give at least one source a weight")
    for name, weight in weights.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise UserError(
                f"data.weights.{name}: must be a number of 0 or more", repr(weight), "use 0 to leave it out"
            )
    # The shortest decimal that stands for the float: 0.1, 0.2 and 0.7 tie where they look as if they did.
    fractions = [Fraction(repr(float(weight))) for weight in weights.values()]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    shares = tuple(int(fraction * scale) for fraction in fractions)
    total = sum(shares)
    if total == 0:
        raise UserError("data.weights: all are 0", fix="give at least one source a weight")
    for name, share in zip(weights, shares, strict=True):
        if 0 < share * window_samples < total:
            raise UserError(
                f"data.weights.{name}: is less than one sample in a window of {window_samples}",
                weights[name],
                f"raise it to {1 / window_samples:.4g} of the sum at least, or set it to 0",
            )
    if not math.isclose(math.fsum(weights.values()), 1.0, abs_tol=1e-6):
        logger.warning("data.weights add up to %g, not 1: taken in proportion.", math.fsum(weights.values()))
    return shares


def _bad_state(found: str) -> UserError:
    what = "data state: is not that of a mixture"
    return UserError(what, found, "resume from another checkpoint", exit_code=ExitCode.BAD_DATA)
