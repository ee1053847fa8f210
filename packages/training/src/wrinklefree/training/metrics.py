"""`metrics.jsonl`: one flushed line for each optimizer step, each event, each validation; only ever appended.

After a kill the last line may be torn, and steps after the checkpoint are written again: readers
(`wrinklefree.runs.read_metrics`) take the last line of each step. `metrics.csv` holds the steps once more,
for spreadsheets, and is written anew when a run ends.
"""

import csv
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wrinklefree.runs import METRICS_VERSION, read_metrics

CSV_COLUMNS = ("step", "loss", "lambda", "mu", "lr", "grad_norm", "tokens", "tokens_per_second", "skipped")


class MetricsWriter:
    """Appends rows; a line is one `write` call, so a kill leaves at most its end torn."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = _open_to_append(path)

    def write(self, kind: str, values: Mapping[str, Any]) -> None:
        os.write(self._descriptor, _line(kind, values))

    def close(self) -> None:
        os.close(self._descriptor)
        self._write_csv()

    def _write_csv(self) -> None:
        target = self.path.with_suffix(".csv")
        temporary = target.with_suffix(f".csv.tmp-{os.getpid()}")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(read_metrics(self.path, kind="step"))
        temporary.replace(target)


def append_row(path: Path, kind: str, values: Mapping[str, Any]) -> None:
    """One row for a file that is written to now and then."""
    descriptor = _open_to_append(path)
    try:
        os.write(descriptor, _line(kind, values))
    finally:
        os.close(descriptor)


def _open_to_append(path: Path) -> int:
    """At the beginning of a line, whatever an earlier writer left unfinished."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.write(descriptor, b"\n")
    return descriptor


def _line(kind: str, values: Mapping[str, Any]) -> bytes:
    row = {"kind": kind, "version": METRICS_VERSION, **values}
    return (json.dumps(_plain(row), allow_nan=False, separators=(",", ":")) + "\n").encode()


def _plain(value: Any) -> Any:
    """json has no NaN; what is not finite is written as its name."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
