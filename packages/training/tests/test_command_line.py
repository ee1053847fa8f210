"""The command line: it answers at once, and every way to end is one line and one exit code."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wrinklefree import __version__


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wrinklefree", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def child_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_names_the_commands_within_half_a_second() -> None:
    seconds = []
    for _ in range(3):
        before = child_seconds()
        answer = run("--help")
        seconds.append(child_seconds() - before)

    assert answer.returncode == 0
    for command in ("demo", "convert", "doctor", "data"):
        assert f"\n  {command} " in answer.stdout
    # CPU time, the best of three: what other processes do on this machine is not our slowness.
    assert min(seconds) < 0.5


@pytest.mark.parametrize("arguments", ["'--help'", "'convert', '--help'", "'data', '--help'", "'convrt'"])
def test_no_heavy_library_is_imported_before_a_command_runs(arguments: str) -> None:
    program = (
        "import sys\nfrom wrinklefree.cli import main\n"
        f"try:\n    main([{arguments}])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'bitnet_arch', 'numpy', 'rich'} & set(sys.modules)))"
    )

    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert answer.stdout.splitlines()[-1] == "[]"


def test_the_version_is_the_packages() -> None:
    assert run("--version").stdout == f"wrinklefree {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert", "a", "b", "--lyout", "stock"], "did you mean '--layout'?"),
        (["convert", "a", "b", "--layout", "stok"], "'training', 'stock'"),
        (["convert"], "model"),
        (["convrt"], "Did you mean 'convert'?"),
        (["doctor", "--jsn"], "did you mean '--json'?"),
        (["--frobnicate"], "--frobnicate"),
        (["demo", "extra"], "extra"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(arguments: list[str], said: str) -> None:
    answer = run(*arguments)

    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("\n") == 1
    assert said in answer.stderr
    assert "fix: see 'wrinklefree" in answer.stderr


FAILING_COMMAND = """
import sys, types
module = types.ModuleType("wrinklefree.commands.doctor")
def doctor(*, as_json):
    {body}
module.doctor = doctor
sys.modules["wrinklefree.commands.doctor"] = module
from wrinklefree.cli import main
main({arguments})
"""


def run_doctor_that(body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = FAILING_COMMAND.format(body=body, arguments=["doctor", *arguments])
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def start_doctor_that(body: str) -> subprocess.Popen[str]:
    program = FAILING_COMMAND.format(body=body, arguments=["doctor"])
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_fault_of_ours_is_one_line_that_names_it_and_the_way_to_see_more() -> None:
    answer = run_doctor_that("raise RuntimeError('the tensor\\nis odd')")

    assert answer.returncode == 1
    assert answer.stderr == "error: RuntimeError: the tensor is odd; run with --debug for the traceback\n"


@pytest.mark.parametrize("error", ["RuntimeError('odd')", "__import__('durable').UserError('a: b')"])
def test_debug_shows_the_traceback_wherever_it_stands(error: str) -> None:
    answer = run_doctor_that(f"raise {error}", "--debug")

    assert "Traceback (most recent call last)" in answer.stderr
    assert answer.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("exit_code", [2, 3, 4, 5, 6, 7])
def test_an_error_of_the_user_ends_with_its_own_exit_code(exit_code: int) -> None:
    answer = run_doctor_that(
        f"from durable import UserError; raise UserError('x.yaml: wrong', fix='do y', exit_code={exit_code})"
    )

    assert (answer.returncode, answer.stderr) == (exit_code, "error: x.yaml: wrong; fix: do y\n")


@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_with_its_code_and_cleans_up(signum: int, exit_code: int) -> None:
    body = (
        "import tempfile, time\n    with tempfile.TemporaryDirectory() as name:\n"
        "        print(name, flush=True)\n        time.sleep(60)"
    )
    child = start_doctor_that(body)
    assert child.stdout is not None
    directory = Path(child.stdout.readline().strip())
    assert directory.is_dir()

    child.send_signal(signum)
    _, stderr = child.communicate(timeout=30)

    assert child.returncode == exit_code
    assert "Traceback" not in stderr
    assert not directory.exists()


def test_a_reader_that_leaves_early_hears_no_complaint() -> None:
    child = start_doctor_that("print('line\\n' * 100000)")
    assert child.stdout is not None
    assert child.stderr is not None

    time.sleep(0.2)
    child.stdout.close()

    assert child.stderr.read() == ""
    child.wait(timeout=30)
