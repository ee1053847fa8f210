"""The README's example runs, and says what it says."""

import re
import subprocess
import sys
from pathlib import Path

import durable

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_runs_as_written(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=True
    )

    newest, skipped, error = done.stdout.splitlines()
    assert newest == "run/checkpoints/step_000500"
    assert skipped.startswith("skipped: run/checkpoints/step_001000/model.bin: is truncated")
    assert error.startswith("error: run/checkpoints/step_001000/model.bin: is truncated, it had 7000 bytes")


def test_the_table_of_exit_codes_is_the_enumeration() -> None:
    rows = re.findall(r"^\| (\d) \| `(\w+)`", README, re.MULTILINE)

    assert [(int(code), name) for code, name in rows] == [
        (code.value, code.name) for code in durable.ExitCode
    ]


def test_everything_public_is_documented() -> None:
    public = [getattr(durable, name) for name in durable.__all__]

    assert [thing for thing in public if callable(thing) and not thing.__doc__] == []
