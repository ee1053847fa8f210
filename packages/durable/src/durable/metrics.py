"""Read a `metrics.jsonl`: rows that a run appended, whose last line a kill may have torn."""

import json
from pathlib import Path
from typing import Any

from durable.errors import ExitCode, UserError

METRICS_VERSION = 1


def read_metrics(path: Path, *, kind: str | None = "step") -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl`, of one kind or (None) all; of a step that was run again, the last row.

    Torn lines are left out. UserError (exit code 4) for a file that cannot be read or is of another version.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read", error.strerror, "name a run's metrics.jsonl", ExitCode.BAD_DATA
        ) from None
    rows: dict[tuple[str, Any], dict[str, Any]] = {}
    for number, line in enumerate(text.splitlines()):
        row = _parsed(line)
        if row is None:
            continue
        if row.get("version") != METRICS_VERSION:
            raise UserError(
                f"{path}:{number + 1}: is of another version",
                row.get("version"),
                f"read it with the release that wrote it; this one reads version {METRICS_VERSION}",
                ExitCode.BAD_DATA,
            )
        if kind in (None, row["kind"]):
            again = row["step"] if row["kind"] == "step" else f"line {number}"
            rows.pop((row["kind"], again), None)
            rows[row["kind"], again] = row
    return list(rows.values())


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "kind" in row else None
