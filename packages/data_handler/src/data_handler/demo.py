"""What runs without a network: a byte-level BPE tokenizer of 512 tokens and four generated sources.

    stories   useful   short tales in plain sentences
    sums      useful   additions worked out digit by digit
    almanac   neutral  tables of dates and numbers that follow no rule
    noise     garbage  random letters

A document is a pure function of (seed, source, index): any stretch can be made without the one before.
Together the sources hold somewhat above five million tokens.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

TOKENIZER_DIR = Path(__file__).parent / "demo_tokenizer"
VOCAB_SIZE = 512
SEED = 1959

_WHO = [
    "the fox",
    "a miller",
    "the old owl",
    "our neighbour",
    "a young queen",
    "the ferryman",
    "my sister",
    "the tall baker",
]
_WHAT = [
    "found a key",
    "lost a coin",
    "built a boat",
    "planted a pear tree",
    "heard a song",
    "crossed the river",
]
_WHERE = [
    "behind the mill",
    "near the sea",
    "under the bridge",
    "in the quiet town",
    "on the hill",
    "beside the road",
]
_WHEN = ["In the morning", "After the rain", "Before winter", "On a clear night", "One day", "At the market"]
_FELT = ["was glad", "laughed", "slept well", "told nobody", "thought about it for a long time", "went home"]
_MONTHS = ["January", "March", "April", "June", "August", "October", "November", "December"]
_THINGS = ["tide", "wind", "frost", "rain", "moonrise", "barley", "wool", "salt"]


def _story(rng: random.Random) -> str:
    who, lines = rng.choice(_WHO), []
    for _ in range(rng.randint(3, 9)):
        when, what, where = rng.choice(_WHEN), rng.choice(_WHAT), rng.choice(_WHERE)
        lines.append(f"{when} {who} {what} {where} and {rng.choice(_FELT)}.")
    return " ".join(lines)


def _sum(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randint(4, 12)):
        left, right = rng.randint(10, 999), rng.randint(10, 999)
        lines.append(f"{left} + {right} = {left + right}, so {left + right} - {right} = {left}.")
    return "\n".join(lines)


def _almanac(rng: random.Random) -> str:
    rows = []
    for _ in range(rng.randint(4, 12)):
        rows.append(
            f"{rng.choice(_MONTHS)} {rng.randint(1, 28)}: "
            f"{rng.choice(_THINGS)} {rng.randint(0, 99)}.{rng.randint(0, 9)}"
        )
    return "\n".join(rows)


def _noise(rng: random.Random) -> str:
    letters = rng.choices("abcdefghijklmnopqrstuvwxyz0123456789#@%&?    ", k=rng.randint(80, 400))
    return "".join(letters)


_MAKERS: dict[str, tuple[Callable[[random.Random], str], int]] = {
    "stories": (_story, 13_000),
    "sums": (_sum, 11_000),
    "almanac": (_almanac, 17_000),
    "noise": (_noise, 7_000),
}
SOURCES = tuple(_MAKERS)


def num_documents(source: str) -> int:
    """How many documents a source has."""
    return _MAKERS[source][1]


def documents(source: str, *, seed: int = SEED, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """Documents `start … stop - 1` of a source."""
    make, count = _MAKERS[source]
    for index in range(start, count if stop is None else min(stop, count)):
        yield make(random.Random(f"{seed} {source} {index}"))
