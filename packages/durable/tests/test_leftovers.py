"""What dead, live and foreign writers left behind: only what nobody can still be writing is removed."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from durable import UserError, leftovers, newest_complete, publish, recover, verify, withdraw

FORKING_WRITER = """
import os, sys
from durable import publish
with publish(sys.argv[1]) as temporary:
    (temporary / "a").write_bytes(b"1")
    child = os.fork()
    if child == 0 and sys.argv[2] == "raises":
        sys.exit(7)
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert temporary.exists() and not os.path.exists(sys.argv[1])
if child == 0:
    os._exit(7)
sys.exit(status)
"""


@pytest.mark.parametrize("child", ["raises", "leaves the block"])
def test_a_child_forked_inside_the_block_neither_publishes_nor_removes_anything(
    child: str, tmp_path: Path
) -> None:
    done = subprocess.run([sys.executable, "-c", FORKING_WRITER, str(tmp_path / "out"), child], check=False)

    assert done.returncode == 7
    assert list(verify(tmp_path / "out").files) == ["a"]


WRITER = """
import os, sys
from durable import publish
with publish(sys.argv[1]) as temporary:
    (temporary / "half.bin").write_bytes(b"half")
    print(temporary, flush=True)
    if sys.argv[2] == "dies":
        os._exit(9)
    sys.stdin.read()
"""


def start_writer(target: Path, fate: str) -> tuple[subprocess.Popen[str], Path]:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target), fate],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    return writer, Path(writer.stdout.readline().strip())


def test_leftovers_of_dead_writers_go_and_those_of_live_writers_stay(tmp_path: Path) -> None:
    live, kept = start_writer(tmp_path / "two", "waits")
    dead, left = start_writer(tmp_path / "one", "dies")
    dead.communicate()
    ours = tmp_path / ".mine.tmp-notes"
    ours.write_text("a name like ours is not ours")
    assert left.exists()

    with publish(tmp_path / "three"):
        pass

    assert (left.exists(), kept.exists(), ours.exists()) == (False, True, True)
    live.communicate()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp-notes", "three", "two"]


def test_leftovers_of_another_host_stay_until_the_caller_is_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, left = start_writer(tmp_path / "one", "dies")
    dead.communicate()
    monkeypatch.setattr("socket.gethostname", lambda: "another")

    recover(tmp_path)
    assert left.exists()

    recover(tmp_path, exclusive=True)
    assert not left.exists()


def test_a_temporary_that_another_container_is_writing_under_our_process_number_stays(tmp_path: Path) -> None:
    writer, kept = start_writer(tmp_path / "one", "waits")
    same_number = re.sub(r"-\d+-(\w+)$", rf"-{os.getpid()}-\1", kept.name)
    kept.rename(tmp_path / same_number)

    recover(tmp_path)
    assert (tmp_path / same_number).exists()

    writer.kill()
    writer.communicate()
    recover(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)


@pytest.mark.usefixtures("no_flock")
def test_without_locks_a_living_process_number_still_protects_its_temporary(tmp_path: Path) -> None:
    live, kept = start_writer(tmp_path / "one", "waits")

    recover(tmp_path)

    assert kept.exists()
    live.communicate()


@pytest.mark.usefixtures("no_flock")
def test_without_locks_a_process_that_writes_two_keeps_both(tmp_path: Path) -> None:
    with publish(tmp_path / "one") as first:
        (first / "a").touch()
        with publish(tmp_path / "two") as second:
            (second / "b").touch()

    assert [list(verify(tmp_path / name).files) for name in ("one", "two")] == [["a"], ["b"]]


def dead_name(kind: str) -> str:
    """Of a writer on this host with a process number that is never given."""
    return f".out.{kind}-{leftovers._host()}-4194305-0123abcd"


def test_a_version_that_was_set_aside_is_put_back_and_then_counts_as_existing(tmp_path: Path) -> None:
    with publish(tmp_path / "out") as temporary:
        (temporary / "a").write_bytes(b"1")
    (tmp_path / "out").rename(tmp_path / dead_name("old"))

    with pytest.raises(UserError, match="out: exists already"), publish(tmp_path / "out"):
        pytest.fail("the block must not be entered")

    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    verify(tmp_path / "out")


def test_the_rename_is_on_disk_before_the_version_that_it_replaced_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / dead_name("tmp")).mkdir()
    (tmp_path / dead_name("old")).mkdir()
    log: list[str] = []

    def logged(name: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            log.append(name)
            real(*args, **kwargs)

        return call

    for name in ("fsync", "rmdir"):
        monkeypatch.setattr(os, name, logged(name, getattr(os, name)))

    recover(tmp_path)

    assert log[:2] == ["fsync", "rmdir"]
    assert log.count("rmdir") == 2


def test_a_link_named_like_a_leftover_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    (tmp_path / dead_name("tmp")).symlink_to("precious")

    recover(tmp_path)

    assert (tmp_path / "precious" / "file").exists()
    assert (tmp_path / dead_name("tmp")).is_symlink()


DYING_REMOVER = """
import os, sys
from durable import withdraw
real, left = os.unlink, int(sys.argv[2])
def dies(*arguments, **named):
    global left
    if left == 0:
        os._exit(9)
    left -= 1
    real(*arguments, **named)
os.unlink = os.remove = dies
withdraw(sys.argv[1])
"""


@pytest.mark.parametrize("files_before", [0, 1, 2])
def test_what_is_withdrawn_by_a_process_that_dies_is_never_seen_in_part(
    files_before: int, tmp_path: Path
) -> None:
    for name in ("step_1", "step_2"):
        with publish(tmp_path / name) as temporary:
            (temporary / "a").write_bytes(b"1")
            (temporary / "b").write_bytes(b"2")

    command = [sys.executable, "-c", DYING_REMOVER, str(tmp_path / "step_1"), str(files_before)]
    assert subprocess.run(command, check=False).returncode == 9

    assert not (tmp_path / "step_1").exists()
    assert newest_complete(tmp_path).skipped == ()
    assert len(list(tmp_path.iterdir())) == 2
    recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]
    withdraw(tmp_path / "step_2")
    assert list(tmp_path.iterdir()) == []
