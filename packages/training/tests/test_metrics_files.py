"""`metrics.csv` holds what `metrics.jsonl` says of every step, once."""

import csv
from pathlib import Path
from typing import Any

from wrinklefree.training.metrics import MetricsWriter


def row(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "loss": step / 10, "samples": [step], "losses": {"dlm": 0.5}, **values}


def read_csv(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write(directory: Path, *rows: dict[str, Any]) -> MetricsWriter:
    """A life that is killed after these rows: nothing is closed."""
    writer = MetricsWriter(directory / "metrics.jsonl")
    for each in rows:
        writer.write("step", each)
    return writer


def test_every_step_is_there_at_once_with_a_column_for_each_number(tmp_path: Path) -> None:
    write(tmp_path, row(1), row(2))

    assert read_csv(tmp_path) == [
        {"step": "1", "loss": "0.1", "losses.dlm": "0.5"},
        {"step": "2", "loss": "0.2", "losses.dlm": "0.5"},
    ]


def test_after_a_kill_no_step_is_there_twice(tmp_path: Path) -> None:
    write(tmp_path, row(1), row(2), row(3, loss=7.0), row(4))
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("5,0.")  # what a kill leaves

    write(tmp_path, row(3), row(4, loss=8.0))

    assert [(line["step"], line["loss"]) for line in read_csv(tmp_path)] == [
        ("1", "0.1"),
        ("2", "0.2"),
        ("3", "0.3"),
        ("4", "8.0"),
    ]


def test_a_number_that_comes_later_has_one_column(tmp_path: Path) -> None:
    writer = write(tmp_path, row(1), row(2, weights={"web, code": 1.0}))
    writer.write("val", {"step": 2, "losses": {"now": {"web": 1.0}}})
    writer.write("step", row(3))
    writer.write("step", row(4, loss=float("nan"), weights={"web, code": 0.5}))
    writer.close()

    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert header == 'step,loss,losses.dlm,"weights.web, code"'
    assert [line["weights.web, code"] for line in read_csv(tmp_path)] == ["", "1.0", "", "0.5"]
    assert read_csv(tmp_path)[-1]["loss"] == "nan"
