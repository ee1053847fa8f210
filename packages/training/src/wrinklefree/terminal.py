"""What commands print: tables, a progress line, a loss curve. Plain text, in a pipe and in a terminal."""

import itertools
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

EIGHTHS = " ▁▂▃▄▅▆▇█"


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str] | None = None, indent: int = 2) -> str:
    """Columns aligned; under a header, those that hold numbers to the right."""
    lines = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    numeric = [
        header is not None and all(_is_numeric(row[column]) for row in rows) for column in range(len(widths))
    ]
    if header:
        lines.insert(1, ["─" * width for width in widths])
    return "\n".join(
        " " * indent
        + "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def megabytes(num_bytes: float) -> str:
    """A size a person can compare: 0.73 MB, 13.4 kB."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def curve(values: Sequence[float], *, width: int = 60, height: int = 6, indent: int = 2) -> str:
    """A curve of positive values over steps, logarithmic upwards, in blocks of an eighth of a line."""
    columns = _means(values, width)
    low, high = math.log(min(columns)), math.log(max(columns))
    levels = [(math.log(value) - low) / (high - low or 1) * (height * 8 - 1) + 1 for value in columns]
    lines = []
    for line in reversed(range(height)):
        cells = "".join(EIGHTHS[max(0, min(8, round(level - line * 8)))] for level in levels)
        label = {height - 1: max(columns), 0: min(columns)}.get(line)
        lines.append(f"{'' if label is None else f'{label:.3g}':>{indent + 6}} │{cells.rstrip()}")
    return "\n".join([*lines, f"{'':>{indent + 6}} └{'─' * len(columns)} {len(values)} steps"])


class LiveLine:
    """In a terminal the last line, rewritten below whatever else is printed; elsewhere plain lines."""

    def __init__(self) -> None:
        self.is_live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._live: Any = None
        self._shown_at = 0.0

    def show(self, text: str, *, keep: bool) -> None:
        """Say it; of what is not to `keep`, ten times a second and in a terminal only."""
        if not self.is_live:
            if keep:
                print(text, flush=True)
        elif keep or time.monotonic() - self._shown_at > 0.1:
            from rich.text import Text

            self._shown_at = time.monotonic()
            # Too long a line loses its end: two rows would not be rewritten as one.
            self._opened().update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)

    def close(self) -> None:
        """Leave the last line standing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _opened(self) -> Any:
        if self._live is None:
            from rich.live import Live

            self._live = Live(auto_refresh=False)
            self._live.start()
        return self._live


def _is_numeric(cell: str) -> bool:
    return not cell or cell[0].isdigit() or cell[0] in "-+≤≥±–"


def _means(values: Sequence[float], count: int) -> list[float]:
    """At most `count` means of neighbouring values."""
    count = min(count, len(values))
    bounds = [index * len(values) // count for index in range(count + 1)]
    return [math.fsum(values[start:end]) / (end - start) for start, end in itertools.pairwise(bounds)]
