"""Real disks that are full, limited, read-only or forbidden: the old version survives, and one line says why.

The disks are tmpfs mounts of a few pages in a mount namespace of the child's own, which vanish with it. Where
a machine allows no namespaces these tests are skipped; limits of a process and permissions need none.
"""

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from durable import UserError, lock, newest_complete, publish, publish_file, verify

OLD, NEW = b"o" * 40_000, b"n" * 60_000


def on_small_disk(directory: Path, options: str, script: str) -> str:
    """What `script` prints, in a process that sees a tmpfs of these options, which it calls `disk`."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    mount = 'mount -t tmpfs -o "$1" tmpfs "$2" && shift 2 && exec "$@"'
    in_namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh", options, str(directory)]
    if subprocess.run([*in_namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace for this user")
    prelude = f"from test_disk import *\ndisk = Path({str(directory)!r})\n"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [*in_namespace, sys.executable, "-c", prelude + script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write(target: Path, content: bytes, **options: bool | int) -> None:
    with publish(target, **options) as temporary:  # type: ignore[arg-type]
        (temporary / "model.bin").write_bytes(content)
        (temporary / "config.json").write_bytes(b"{}")


def write_file(target: Path, content: bytes, **options: bool | int) -> None:
    with publish_file(target, **options) as temporary:  # type: ignore[arg-type]
        temporary.write_bytes(content)


def failure(action: Callable[[], object]) -> UserError:
    """The error that `action` ends in; it must be one of exit code 5, on one line."""
    with pytest.raises(UserError) as caught:
        action()
    assert caught.value.exit_code == 5
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


def fill(disk: Path, *, num_free_pages: int) -> None:
    """Leave so many pages of 4,096 bytes free on a small disk."""
    (disk / "filler").unlink(missing_ok=True)
    with (disk / "filler").open("wb", buffering=0) as file:
        size = 0
        try:
            while written := file.write(bytes(4096)):
                size += written
        except OSError:
            file.truncate(max(0, size - 4096 * num_free_pages))


@pytest.mark.parametrize("writer", ["write", "write_file"])
def test_a_disk_full_at_any_page_leaves_the_old_version_and_no_temporary(writer: str, tmp_path: Path) -> None:
    script = f"""
target = disk / "target"
for num_free_pages in range(30):
    {writer}(target, OLD, replace=True)
    fill(disk, num_free_pages=num_free_pages)
    try:
        {writer}(target, NEW, replace=True)
        expected = NEW
    except UserError as error:
        assert error.exit_code == 5
        assert f"{{target}}: cannot be written, the disk has too little room (found " in str(error), error
        expected = OLD
    content = (verify(target) and target / "model.bin" if target.is_dir() else target).read_bytes()
    assert content == expected
    assert sorted(path.name for path in disk.iterdir()) == ["filler", "target"]
    (disk / "filler").unlink()
    print("new" if expected == NEW else "old")
"""
    outcomes = on_small_disk(tmp_path, "size=400k", script).split()

    num_pages = outcomes.index("new")
    assert num_pages >= len(NEW) // 4096
    assert outcomes == ["old"] * num_pages + ["new"] * (30 - num_pages)


def test_a_full_disk_says_how_much_was_needed_written_and_free(tmp_path: Path) -> None:
    script = """
print(failure(lambda: write(disk / "a", bytes(500_000))))
print(failure(lambda: write(disk / "a", bytes(500_000), bytes_needed=500_000)))
print(failure(lambda: write(disk / "a", bytes(500_000), bytes_needed=190_000)))
"""
    unknown, refused, exceeded = on_small_disk(tmp_path, "size=200k", script).splitlines()

    assert "cannot be written, the disk has too little room (found " in unknown
    assert "0 bytes free" in unknown
    assert "too little room (found 204,800 bytes free, 500,000 needed); fix: free 295,200 bytes" in refused
    assert (
        "the disk has too little room (found 190,000 bytes needed, 204,800 bytes written, 0 bytes free)"
        in exceeded
    )


def test_a_disk_without_room_for_another_name_is_told_apart(tmp_path: Path) -> None:
    script = """
write(disk / "old", OLD)
for index in range(20):
    try:
        (disk / str(index)).touch()
    except OSError:
        break
print(failure(lambda: write(disk / "old", NEW, replace=True)))
verify(disk / "old")
"""
    assert "the disk can hold no more files" in on_small_disk(tmp_path, "size=4m,nr_inodes=12", script)


def test_a_read_only_disk_can_be_read_and_not_written(tmp_path: Path) -> None:
    script = """
write(disk / "step_000001", OLD)
(disk / ".step_000009.tmp-0123abcd-1-0123abcd").mkdir()
subprocess.run(["mount", "-o", "remount,bind,ro", str(disk)], check=True)
print(newest_complete(disk).path)
print(failure(lambda: write(disk / "step_000002", NEW)))
print(failure(lambda: write(disk / "step_000001", NEW, replace=True)))
print(failure(lambda: write_file(disk / "new" / "model.gguf", NEW)))
print(failure(lambda: lock(disk).__enter__()))
"""
    newest, *errors = on_small_disk(tmp_path, "size=400k", script).splitlines()

    assert newest == str(tmp_path / "step_000001")
    assert len(errors) == 4
    assert all("the filesystem is read-only; fix: " in error for error in errors)


def test_a_mount_point_as_a_target_is_named(tmp_path: Path) -> None:
    error = on_small_disk(tmp_path, "size=400k", "print(failure(lambda: write(disk, NEW)))")

    assert "cannot be written, something is mounted there; fix: choose a directory inside the mount" in error


def forked(action: Callable[[], object]) -> None:
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("limit", [0, 1, 30_000, 59_999])
def test_a_limit_on_file_sizes_leaves_the_old_version(limit: int, tmp_path: Path) -> None:
    write(tmp_path / "dir", OLD)
    write_file(tmp_path / "file", OLD)

    def exceed() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        for action in (write, write_file):
            target = tmp_path / ("dir" if action is write else "file")
            error = str(failure(partial(action, target, NEW, replace=True)))
            assert (
                f"a file grew larger than this process or filesystem allows (found a limit of {limit:,}"
                in error
            )

    forked(exceed)

    verify(tmp_path / "dir")
    assert (tmp_path / "dir" / "model.bin").read_bytes() == (tmp_path / "file").read_bytes() == OLD
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dir", "file"]


@pytest.fixture
def shared_directory() -> Iterator[Path]:
    """A directory that a user without rights can reach, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)
        Path(name).chmod(0o755)


def test_a_directory_without_permission_is_named(shared_directory: Path) -> None:
    write(shared_directory / "dir", OLD)
    write_file(shared_directory / "file", OLD)
    shared_directory.chmod(0o555)

    def attempt() -> None:
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 65534)  # permissions do not stop root
        for action in (
            lambda: write(shared_directory / "new", NEW),
            lambda: write(shared_directory / "dir", NEW, replace=True),
            lambda: write_file(shared_directory / "file", NEW, replace=True),
            lambda: write(shared_directory / "some" / "where" / "below", NEW),
            lambda: lock(shared_directory).__enter__(),
        ):
            assert "permission is denied; fix: change the permissions of its directory" in str(
                failure(action)
            )
        assert newest_complete(shared_directory).path == shared_directory / "dir"

    forked(attempt)

    assert sorted(path.name for path in shared_directory.iterdir()) == ["dir", "file"]


def raise_from_library(error: Exception) -> Callable[[Path], None]:
    def action(target: Path) -> None:
        with publish(target) as temporary:
            (temporary / "part").write_bytes(b"xyz")
            raise error

    return action


def test_a_library_that_hides_a_full_disk_is_seen_through(tmp_path: Path) -> None:
    chained = RuntimeError("could not serialize")
    chained.__context__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    errors: list[tuple[Exception, str]] = [
        (
            ValueError("I/O error: No space left on device (os error 28)"),
            "the disk has too little room",
        ),  # safetensors
        (chained, "the disk quota is used up"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError(errno.EROFS, "Read-only", str(tmp_path / "elsewhere")), "Read-only"),
    ]

    for error, expected in errors[:3]:
        text = str(failure(partial(raise_from_library(error), tmp_path / "out")))
        assert f"{tmp_path / 'out'}: cannot be written, {expected}" in text
    with pytest.raises(OSError, match="elsewhere"):
        raise_from_library(errors[3][0])(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


TORCH_ERROR = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")


def test_torch_with_a_limit_or_a_full_disk_is_seen_through_and_nothing_is_made_up(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="unexpected pos"):
        raise_from_library(TORCH_ERROR)(tmp_path / "out")  # there is room

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3, 3))  # what the block has written by then
        action = partial(raise_from_library(TORCH_ERROR), tmp_path / "out")
        assert "a file grew larger than this" in str(failure(action))

    forked(limited)
    script = 'print(failure(lambda: raise_from_library(TORCH_ERROR)(disk / "out")))'
    assert "the disk has too little room" in on_small_disk(tmp_path, "size=40k", script)


def test_an_error_that_was_being_handled_before_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    try:
        raise OSError(errno.ENOSPC, "the other disk is full")
    except OSError:
        with pytest.raises(KeyError, match="mine"):
            raise_from_library(KeyError("mine"))(tmp_path / "out")
