"""`wrinklefree runs`: which runs a directory holds, what became of one, how two differ."""

from pathlib import Path
from typing import Any

import yaml

from durable import ExitCode, UserError, newest_complete
from wrinklefree.runs import read_metrics
from wrinklefree.training.resuming import differences


def list_runs(directory: Path) -> None:
    """One line for each run below a directory."""
    found = sorted(
        path.parent for path in directory.rglob("config.yaml") if (path.parent / "checkpoints").is_dir()
    )
    if not found:
        raise UserError(f"{directory}: holds no runs", fix="name the output_dir of a run")
    for run in found:
        config, rows = _config(run), _rows(run)
        last = rows[-1] if rows else None
        state = (
            f"step {last['step']}/{_max_steps(config)}  loss {last['loss']:.4f}" if last else "no step yet"
        )
        print(f"{run}  {config['model']['name']}  {state}")


def show(run: Path) -> None:
    """Configuration, checkpoints and the last numbers of a run."""
    config, rows = _config(run), _rows(run)
    print(f"{run}: {config['model']['name']}, {config['training']['stage']}")
    if rows:
        last = rows[-1]
        print(f"step {last['step']}/{_max_steps(config)}, loss {last['loss']!r}, {last['tokens']:,} tokens")
    events = read_metrics(run / "metrics.jsonl", kind="event")
    print(f"resumed {sum(row['event'] == 'resumed' for row in events)} times, skipped {_skipped(rows)} steps")
    newest = newest_complete(run / "checkpoints")
    print(f"newest checkpoint that verifies: {newest.path.name if newest.path else 'none'}")
    for skipped in newest.skipped:
        print(f"damaged: {skipped.reason}")


def diff(one: Path, other: Path) -> None:
    """Keys that differ, and the losses at the last step that both have."""
    changed = differences(_config(one), _config(other))
    for key, before, after in changed:
        print(f"{key}: {before!r} → {after!r}")
    if not changed:
        print("the configurations are equal")
    first, second = ({row["step"]: row["loss"] for row in _rows(run)} for run in (one, other))
    shared = [step for step in first if step in second]
    if shared:
        equal = sum(first[step] == second[step] for step in shared)
        step = shared[-1]
        print(
            f"{equal} of {len(shared)} losses are equal; at step {step}: {first[step]!r} and {second[step]!r}"
        )


def _config(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(
            f"{path}: is no configuration of a run",
            type(error).__name__,
            "name the directory of a run",
            ExitCode.BAD_DATA,
        ) from None
    assert isinstance(content, dict)
    return content


def _rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return read_metrics(path) if path.is_file() else []


def _max_steps(config: dict[str, Any]) -> str:
    return str(config["training"]["max_steps"] or "?")


def _skipped(rows: list[dict[str, Any]]) -> int:
    return sum(row["skipped"] for row in rows)
