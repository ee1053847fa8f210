"""How far `prepare` is: share done, tokens, tokens per second, time left."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

Advance: TypeAlias = Callable[[int, int], None]
"""Called with the tokens and the bytes of each piece that is done."""
Meter: TypeAlias = Callable[[str, int | None, int], AbstractContextManager[Advance]]
"""(source, token budget, bytes in all, 0 where unknown) → what to call after each piece."""


@contextmanager
def no_progress(source: str, max_tokens: int | None, num_bytes: int) -> Iterator[Advance]:
    """Say nothing."""
    yield lambda tokens, size: None


@contextmanager
def progress_bar(source: str, max_tokens: int | None, num_bytes: int) -> Iterator[Advance]:
    """A bar over the token budget where there is one, else over the bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(
            "{task.percentage:>3.0f}%  {task.fields[tokens]:,} tokens  {task.fields[speed]:,.0f} tokens/s"
        ),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        total = max_tokens or num_bytes or None
        task = progress.add_task(source, total=total, tokens=0, speed=0.0)

        def advance(tokens: int, size: int) -> None:
            state = progress.tasks[task]
            made = state.fields["tokens"] + tokens
            speed = made / max(state.elapsed or 0.0, 1e-9)
            progress.update(task, advance=tokens if max_tokens else size, tokens=made, speed=speed)

        yield advance
