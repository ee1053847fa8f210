"""What dead, live and foreign writers left behind: only what nobody can still be writing is removed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from durable import leftovers, publish, recover, verify

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


def test_a_link_named_like_a_leftover_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    name = f".out.tmp-{leftovers._host()}-999999999-0123abcd"
    (tmp_path / name).symlink_to("precious")

    recover(tmp_path)

    assert (tmp_path / "precious" / "file").exists()
