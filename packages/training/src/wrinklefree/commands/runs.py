"""`wrinklefree runs`: which runs a directory holds, what became of one, how two differ; and removing one."""

import shutil
from pathlib import Path
from typing import Any

import yaml

from durable import ExitCode, UserError, lock, newest_complete
from wrinklefree.masking import masked
from wrinklefree.runs import read_metrics
from wrinklefree.terminal import megabytes
from wrinklefree.training.resuming import differences
from wrinklefree.training.run_directory import BEST
from wrinklefree.training.run_fingerprint import read_fingerprint

NAME_A_RUN = "name the directory of a run; `wrinklefree runs list OUTPUT_DIR` prints them"


def list_runs(directory: Path) -> None:
    """One line for each run below a directory."""
    found = sorted(path.parent for path in directory.rglob("config.yaml") if _is_run(path.parent))
    if not found:
        raise UserError(f"{directory}: holds no runs", fix="name the output_dir of a run")
    for run in found:
        config, rows = _config(run), _rows(run)
        last = rows[-1] if rows else None
        state = "no step yet"
        if last is not None:  # a loss that is no number is written as a text
            state = f"step {last['step']}/{_max_steps(config)}  loss {float(last['loss']):.4f}"
        print(f"{run}  {config['model']['name']}  {state}")


def show(run: Path) -> None:
    """Where its numbers come from, checkpoints, and the last numbers of a run."""
    config, rows = _config(run), _rows(run)
    print(f"{run}: {config['model']['name']}, {config['training']['stage']}")
    fingerprint = read_fingerprint(run)
    if fingerprint is not None:
        git, versions = fingerprint["git"], fingerprint["versions"]
        dirty = " and uncommitted changes" if git["uncommitted_changes"] else ""
        print(f"fingerprint {fingerprint['fingerprint'][:16]}: commit {git['commit'][:12]}{dirty}")
        print("versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
        print(f"data: {', '.join(fingerprint['data'])}")
    if rows:
        last = rows[-1]
        print(f"step {last['step']}/{_max_steps(config)}, loss {last['loss']!r}, {last['tokens']:,} tokens")
    events = _rows(run, "event")
    print(f"resumed {sum(row['event'] == 'resumed' for row in events)} times, skipped {_skipped(rows)} steps")
    newest = newest_complete(run / "checkpoints", ignore=(BEST,))
    print(f"newest checkpoint that verifies: {newest.path.name if newest.path else 'none'}")
    for skipped in newest.skipped:
        print(f"damaged: {skipped.reason}")


def diff(one: Path, other: Path) -> None:
    """Keys that differ, the losses at the last step that both have, and the last loss of each."""
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
    for run, losses in ((one, first), (other, second)):
        step = max(losses, default=0)
        print(f"{run}: {f'last loss {losses[step]!r}, at step {step}' if losses else 'no step yet'}")


def remove(run: Path, *, outputs: Path, yes: bool) -> None:
    """Remove the directory of a run below `outputs`; never one that is in use, never anything else."""
    found, root = run.resolve(), outputs.resolve()
    if not found.is_relative_to(root) or found == root:
        raise UserError(
            f"{run}: does not lie below {outputs}", str(found), "name its output_dir with --outputs"
        )
    if run.is_symlink() or not _is_run(found):
        raise UserError(f"{run}: is no directory of a run", fix=NAME_A_RUN)
    size = sum(path.lstat().st_size for path in found.rglob("*") if not path.is_dir())
    rows = _rows(found)
    what = f"{found}: {len(rows)} steps, {megabytes(size)}"
    if not yes:
        raise UserError(f"{what}: would be removed, with all its checkpoints", fix="add --yes")
    with lock(found):
        shutil.rmtree(found)
    print(f"removed {what}")


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and (path / "checkpoints").is_dir()


def _config(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        content["model"]["name"], content["training"]["stage"], content["training"]["max_steps"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError) as error:
        raise UserError(
            f"{path}: is no configuration of a run", type(error).__name__, NAME_A_RUN, ExitCode.BAD_DATA
        ) from None
    shown: dict[str, Any] = masked(content)
    return shown


def _rows(run: Path, kind: str = "step") -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return read_metrics(path, kind=kind) if path.is_file() else []


def _max_steps(config: dict[str, Any]) -> str:
    return str(config["training"]["max_steps"] or "?")


def _skipped(rows: list[dict[str, Any]]) -> int:
    return sum(row["skipped"] for row in rows)
