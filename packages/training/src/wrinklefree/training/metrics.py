"""`metrics.jsonl`: one flushed line for each optimizer step, each event, each validation; only ever appended.

After a kill the last line may be torn, and steps after the checkpoint are written again: readers
(`wrinklefree.runs.read_metrics`) take the last line of each step. `metrics.csv` holds the steps once more,
for spreadsheets, a column for each number: the first step of a life writes it anew up to there, so no step
is in it twice.
"""

import csv
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from durable import mask_secrets, publish_file
from wrinklefree.runs import METRICS_VERSION, read_metrics

NOT_IN_CSV = ("kind", "version", "samples")


class MetricsWriter:
    """Appends rows; a line is one `write` call, so a kill leaves at most its end torn."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = _open_to_append(path)
        self._csv = CsvTable(path)

    def write(self, kind: str, values: Mapping[str, Any]) -> None:
        row = _row(kind, values)
        os.write(self._descriptor, _line(row))
        if kind == "step":
            self._csv.add(row)

    def close(self) -> None:
        os.close(self._descriptor)
        self._csv.close()


class CsvTable:
    """The steps of a `metrics.jsonl`; rewritten from there when a life begins or a column is new."""

    def __init__(self, metrics: Path) -> None:
        self.metrics = metrics
        self.path = metrics.with_suffix(".csv")
        self._columns: list[str] = []
        self._descriptor: int | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        """`row` stands in `metrics.jsonl` already."""
        cells = flattened(row)
        if self._descriptor is None or not cells.keys() <= set(self._columns):
            self._rewrite(up_to=row["step"])
        else:
            os.write(self._descriptor, _lines(self._columns, [cells]).encode())

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _rewrite(self, up_to: int) -> None:
        """Later steps are of an earlier life, which a resume throws away."""
        self.close()
        rows = [flattened(row) for row in read_metrics(self.metrics) if row["step"] <= up_to]
        rows.sort(key=lambda cells: cells["step"])
        self._columns = list(dict.fromkeys(name for cells in rows for name in cells))
        header = {name: name for name in self._columns}
        with publish_file(self.path, replace=True) as file:
            file.write_text(_lines(self._columns, [header, *rows]), encoding="utf-8")
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)


def flattened(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name → number: `{"losses": {"dlm": 1.5}}` is `{"losses.dlm": 1.5}`; no lists."""
    cells: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            cells |= flattened(value, f"{prefix}{name}.")
        elif prefix or name not in NOT_IN_CSV:
            cells[f"{prefix}{name}"] = value
    return cells


def _lines(columns: list[str], rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="").writerows(rows)
    return text.getvalue()


def append_row(path: Path, kind: str, values: Mapping[str, Any]) -> None:
    """One row for a file that is written to now and then."""
    descriptor = _open_to_append(path)
    try:
        os.write(descriptor, _line(_row(kind, values)))
    finally:
        os.close(descriptor)


def _open_to_append(path: Path) -> int:
    """At the beginning of a line, whatever an earlier writer left unfinished."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.write(descriptor, b"\n")
    return descriptor


def _row(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = _plain({"kind": kind, "version": METRICS_VERSION, **values})
    return row


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n").encode()


def _plain(value: Any) -> Any:
    """json has no NaN; what is not finite is written as its name. Secrets are masked."""
    if isinstance(value, str):
        return mask_secrets(value)
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
