"""One holder at a time, named to everybody else, and none after its death."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from durable import UserError, lock

HOLDER = """
import os, sys
from durable import lock
with lock(sys.argv[1]):
    if "forks" in sys.argv and os.fork() == 0:
        print(os.getpid(), flush=True)
        sys.stdin.read()
        os._exit(0)
    if "forks" not in sys.argv:
        print(os.getpid(), flush=True)
    sys.stdin.read()
"""


def hold(directory: Path, *words: str) -> tuple[subprocess.Popen[str], int]:
    """A process that holds `directory` until its stdin closes, and the process number that it prints."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    return holder, int(holder.stdout.readline())


def refusal(directory: Path) -> str:
    with pytest.raises(UserError) as caught, lock(directory):
        pytest.fail("locked twice")
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_a_second_process_is_refused_with_the_number_and_host_of_the_first(tmp_path: Path) -> None:
    holder, number = hold(tmp_path / "run")

    text = refusal(tmp_path / "run")
    holder.communicate()

    assert f"process {number} on host {socket.gethostname()}" in text
    assert str(tmp_path / "run") in text
    with lock(tmp_path / "run"):
        pass  # it has ended


def test_a_killed_holder_is_taken_over_and_its_name_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    holder, number = hold(tmp_path)
    os.kill(number, signal.SIGKILL)
    holder.communicate()
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == number

    with lock(tmp_path) as path:
        assert path == tmp_path / "run.lock"
        assert json.loads(path.read_text())["pid"] == os.getpid()

    assert f"taken over from process {number}" in caplog.text
    assert (tmp_path / "run.lock").read_text() == ""


def test_a_stale_name_of_a_living_process_does_not_hold_anything(tmp_path: Path) -> None:
    stale = {"pid": os.getppid(), "host": "a host with a much longer name than this one" * 3, "since": "?"}
    (tmp_path / "run.lock").write_text(json.dumps(stale))

    with lock(tmp_path) as path:
        assert json.loads(path.read_text())["host"] == socket.gethostname()


def test_the_same_process_and_thread_cannot_lock_twice(tmp_path: Path) -> None:
    answers: list[str] = []

    with lock(tmp_path):
        assert f"process {os.getpid()}" in refusal(tmp_path)
        thread = threading.Thread(target=lambda: answers.append(refusal(tmp_path)))
        thread.start()
        thread.join()
    assert len(answers) == 1

    with lock(tmp_path):
        pass  # the refused attempts left nothing behind


def test_the_lock_is_released_when_the_block_raises(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock(tmp_path):
        raise ZeroDivisionError

    with lock(tmp_path):
        pass


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    holder, child = hold(tmp_path, "forks")
    assert f"process {holder.pid}" in refusal(tmp_path)

    holder.kill()
    holder.wait()
    os.kill(child, 0)  # it is still there

    with lock(tmp_path):
        pass
    holder.communicate()


def test_a_forked_child_that_leaves_the_block_does_not_release_the_lock(tmp_path: Path) -> None:
    script = """
import os, sys
from durable import lock
with lock(sys.argv[1]):
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        print(open(os.path.join(sys.argv[1], "run.lock")).read(), flush=True)
        sys.stdin.read()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None

    assert json.loads(holder.stdout.readline())["pid"] == holder.pid
    assert f"process {holder.pid}" in refusal(tmp_path)
    holder.communicate()


def test_a_program_that_the_holder_starts_does_not_keep_the_lock(tmp_path: Path) -> None:
    with lock(tmp_path):
        program = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    with lock(tmp_path):
        program.communicate(b"\n")


def test_a_lock_file_removed_by_hand_is_made_again(tmp_path: Path) -> None:
    with lock(tmp_path):
        (tmp_path / "run.lock").unlink()

    with lock(tmp_path):
        assert (tmp_path / "run.lock").exists()
        assert "is in use" in refusal(tmp_path)


@pytest.mark.parametrize("another_takes_its_name", [False, True])
def test_a_lock_file_removed_while_it_is_being_locked_is_not_the_one_that_counts(
    another_takes_its_name: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock
    removals = [tmp_path / "run.lock"]

    def remove_then_lock(descriptor: int, operation: int) -> None:
        if removals:
            path = removals.pop()
            path.unlink()
            if another_takes_its_name:
                path.touch()
        real(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", remove_then_lock)

    with lock(tmp_path) as path:
        assert json.loads(path.read_text())["pid"] == os.getpid()
        assert "is in use" in refusal(tmp_path)


def test_a_holder_that_has_not_said_its_name_or_lies_is_still_refused(tmp_path: Path) -> None:
    with lock(tmp_path) as path:
        path.write_text("")
        assert "a process that has not said its name" in refusal(tmp_path)
        path.write_bytes(b"\xff[" * 5000)
        assert "an unknown process" in refusal(tmp_path)
        path.write_text('{"pid": "x\\ny", "host": "\\u001b[31m", "since": {}}')
        assert refusal(tmp_path).isprintable()


def test_a_lock_that_cannot_be_written_is_an_error_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "a directory" / "run.lock").mkdir(parents=True)
    (tmp_path / "a link").mkdir()
    (tmp_path / "a link" / "run.lock").symlink_to("../file")

    for directory in ("file", "file/below", "a directory", "a link"):
        with pytest.raises(UserError, match="cannot be written") as caught, lock(tmp_path / directory):
            pytest.fail("locked")
        assert caught.value.exit_code == 5
    assert (tmp_path / "file").read_bytes() == b""


def test_a_filesystem_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)

    with pytest.raises(UserError, match="cannot be locked on this filesystem") as caught, lock(tmp_path):
        pytest.fail("locked")
    assert caught.value.exit_code == 5
