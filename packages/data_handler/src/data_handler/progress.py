"""How far `prepare` is: share done, tokens, tokens per second, time left."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What there is to do for one source, and what an earlier run has done of it."""

    source: str
    max_tokens: int | None
    num_bytes: int
    """0 where nobody knows."""
    tokens_there: int = 0
    bytes_there: int = 0

    def share(self, tokens: int, size: int) -> float:
        """How much of it so many tokens and bytes are: whichever of budget and source ends first."""
        shares = [tokens / self.max_tokens if self.max_tokens else 0.0]
        shares += [size / self.num_bytes if self.num_bytes else 0.0]
        return min(1.0, max(shares))


Advance: TypeAlias = Callable[[int, int], None]
"""Called with the tokens and the bytes that were done since the last call."""
Meter: TypeAlias = Callable[[Work], AbstractContextManager[Advance]]


@contextmanager
def no_progress(work: Work) -> Iterator[Advance]:
    """Say nothing."""
    yield lambda tokens, size: None


class Pace:
    """Tokens per second and seconds left, from what this run has done itself."""

    def __init__(self, work: Work, now: float) -> None:
        self.work, self.begun = work, now
        self.tokens, self.size = work.tokens_there, work.bytes_there

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.work.share(self.tokens, self.size)

    def speed(self, now: float) -> float:
        """Tokens per second."""
        return (self.tokens - self.work.tokens_there) / max(now - self.begun, 1e-9)

    def seconds_left(self, now: float) -> float | None:
        """None while nothing can be said."""
        done = self.share - self.work.share(self.work.tokens_there, self.work.bytes_there)
        return None if done <= 0 else (now - self.begun) * (1 - self.share) / done


@contextmanager
def progress_bar(work: Work) -> Iterator[Advance]:
    """A bar over the token budget or the bytes of the source, whichever is nearer its end."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    pace = Pace(work, time.monotonic())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        known = bool(work.max_tokens or work.num_bytes)
        task = progress.add_task(work.source, total=1.0 if known else None, state="")

        def advance(tokens: int, size: int) -> None:
            pace.tokens += tokens
            pace.size += size
            progress.update(task, completed=pace.share, state=describe(pace, time.monotonic()))

        advance(0, 0)
        yield advance


def describe(pace: Pace, now: float) -> str:
    """Share done, tokens, tokens per second and time left, in a few words."""
    left = pace.seconds_left(now)
    share = f"{pace.share:4.0%}  " if pace.work.max_tokens or pace.work.num_bytes else ""
    ending = f", {_clock(left)} left" if left is not None else ""
    return f"{share}{pace.tokens:,} tokens, {pace.speed(now):,.0f} tokens/s{ending}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
