"""`wrinklefree data` is the command line of `data_handler`, reached without importing more than that."""

import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wrinklefree", "data", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_its_help_names_the_commands_of_data_handler_and_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "datasets", "yaml", "numpy", "pyarrow", "rich"}
    program = (
        "import sys\nfrom wrinklefree.cli import main\n"
        "try:\n    main(['data', '--help'])\nexcept SystemExit:\n    pass\n"
        f"print(sorted({heavy} & set(sys.modules)))"
    )

    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    for command in ("list", "show", "prepare", "preview", "stats", "verify", "score", "reweight"):
        assert f"\n  {command} " in answer.stdout
    assert answer.stdout.splitlines()[-1] == "[]"


def test_options_reach_the_command_behind_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "the owl"}\n{"text": "the fox"}\n')
    (tmp_path / "c.yaml").write_text(f"name: c\nsources: {{owls: {{path: {tmp_path / 'a.jsonl'}}}}}")

    shown = run("preview", str(tmp_path / "c.yaml"), "-n", "1")

    assert shown.returncode == 0
    assert "the owl<|endoftext|>" in shown.stdout
    assert "fox" not in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["shwo"], 2, "Did you mean 'show'?"),
        (["show"], 2, "Missing argument"),
        (["show", "mixed_pretrian"], 2, "did you mean 'mixed_pretrain'?"),
        (["prepare", "demo", "--oot", "x"], 2, "did you mean '--out'?"),
        (["stats", "nothing-here"], 4, "nothing-here"),
    ],
)
def test_what_is_wrong_is_one_line_and_its_exit_code(arguments: list[str], exit_code: int, said: str) -> None:
    answer = run(*arguments)

    assert (answer.returncode, answer.stdout) == (exit_code, "")
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("\n") == 1
    assert said in answer.stderr
