"""Wherever a writer is killed, interrupted or refused: no half file, and the old version survives.

Nothing here sleeps or guesses. `Calls` stands between the writer and the system; each test runs the same
write again and again, and stops it at the first system call, the second, the third, until one comes through.
"""

import errno
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from durable import UserError, newest_complete, publish, publish_file, renaming, verify

CHANGING = ["mkdir", "open", "write", "pwrite", "ftruncate", "fchmod", "fsync", "rename", "unlink", "rmdir"]
Act = Callable[[int, str, Callable[[], Any], tuple[Any, ...]], Any]

OLD = {"model.bin": b"old weights" * 3, "tokenizer/vocab.txt": b"a b c", "gone.txt": b"not in the new one"}
NEW = {"model.bin": b"new weights, of another size" * 5, "tokenizer/vocab.txt": b"d e", "added.txt": b"x"}
LATER = {"model.bin": b"written after the accident"}
VERSIONS = {"old": OLD, "new": NEW, "later": LATER}


@dataclass
class Calls:
    """Hands every system call that changes something to `act`: number, name, what performs it, arguments."""

    act: Act
    number: int = 0
    real: list[tuple[Any, str, Any]] = field(default_factory=list)

    def __enter__(self) -> "Calls":
        for module, name in [*((os, name) for name in CHANGING), (renaming, "_renameat2")]:
            self.real.append((module, name, getattr(module, name)))
            setattr(module, name, self._counted(name, getattr(module, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for module, name, real in self.real:
            setattr(module, name, real)

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)  # opening to read changes nothing
            self.number += 1
            return self.act(self.number, name, lambda: real(*args, **kwargs), args)

        return call


@dataclass(frozen=True)
class Case:
    """One way to write: a directory or a file, new or replacing, with or without renameat2."""

    replaces: bool
    is_file: bool = False
    has_renameat2: bool = True

    def write(self, target: Path, version: dict[str, bytes], *, replace: bool) -> None:
        if self.is_file:
            with publish_file(target, replace=replace) as temporary:
                write_bytes(temporary, version["model.bin"])
            return
        with publish(target, replace=replace, metadata={"step": 3}) as temporary:
            for name, content in version.items():
                if not (temporary / name).parent.exists():
                    (temporary / name).parent.mkdir()
                write_bytes(temporary / name, content)

    def found(self, target: Path) -> str:
        """Which version is at `target`; a mixture, or anything visible beside it, is a failure."""
        neighbours = target.parent.iterdir() if target.parent.exists() else ()
        assert [path for path in neighbours if not path.name.startswith(".") and path != target] == []
        if not target.exists():
            return "nothing"
        if self.is_file:
            weights = target.read_bytes()
            return next(name for name in VERSIONS if VERSIONS[name]["model.bin"] == weights)
        verify(target)
        files = [path for path in target.rglob("*") if path.is_file() and path.name != "manifest.json"]
        content = {path.relative_to(target).as_posix(): path.read_bytes() for path in files}
        return next(name for name in VERSIONS if VERSIONS[name] == content)


CASES = [
    pytest.param(Case(replaces=False), id="new directory"),
    pytest.param(Case(replaces=True), id="replaced directory, exchanged"),
    pytest.param(Case(replaces=True, has_renameat2=False), id="replaced directory, two renames"),
    pytest.param(Case(replaces=False, is_file=True), id="new file"),
    pytest.param(Case(replaces=False, is_file=True, has_renameat2=False), id="new file, no renameat2"),
    pytest.param(Case(replaces=True, is_file=True), id="replaced file"),
]


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """In memory, where fsync costs nothing, on another filesystem than TMPDIR; else on disk.

    What fsync does is not seen by killing a process anyway: the last test looks at the order of the calls.
    """
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, scratch: Path) -> Case:
    case: Case = request.param
    if not case.has_renameat2:
        monkeypatch.setattr(renaming, "_renameat2", lambda source, target, flags: False)
    elif case.replaces and not case.is_file and not can_exchange(scratch):
        pytest.skip("renameat2 cannot exchange on this filesystem")
    return case


def can_exchange(directory: Path) -> bool:
    names = [directory / "first", directory / "second"]
    for path in names:
        path.mkdir()
    answer = renaming.exchange(names[0], names[1])
    for path in names:
        path.rmdir()
    return answer


def write_bytes(path: Path, content: bytes) -> None:
    """Two system calls, so that there is a moment with half of the file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    half = len(content) // 2
    try:
        os.write(descriptor, content[:half])
        os.write(descriptor, content[half:])
    finally:
        os.close(descriptor)


def in_child(action: Callable[[], object]) -> int:
    """Run `action` in a forked child; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            os._exit(99)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def prepared(case: Case, directory: Path) -> Path:
    target = directory / "step_000003"
    if case.replaces:
        case.write(target, OLD, replace=False)
    return target


def assert_next_write_tidies_up(case: Case, target: Path) -> None:
    case.write(target, LATER, replace=True)

    assert case.found(target) == "later"
    assert list(target.parent.iterdir()) == [target]


def test_killed_at_any_system_call_a_writer_leaves_the_old_version_or_the_new_one(
    case: Case, scratch: Path
) -> None:
    outcomes: list[str] = []
    for number in count(1):
        target = prepared(case, scratch / str(number))

        status = in_child(partial(write_and_be_killed, case, target, number))

        assert status in (0, -signal.SIGKILL)
        outcomes.append(case.found(target))
        if not case.is_file:
            newest = newest_complete(target.parent)
            if case.replaces and outcomes[-1] == "nothing":
                assert not case.has_renameat2, "an exchange leaves no moment without a version"
                outcomes[-1] = case.found(target)  # put back just now
            assert (newest.path, newest.skipped) == (None if outcomes[-1] == "nothing" else target, ())
        assert_next_write_tidies_up(case, target)
        if status == 0:
            break

    first, switch = "old" if case.replaces else "nothing", outcomes.index("new")
    assert outcomes == [first] * switch + ["new"] * (len(outcomes) - switch)
    assert switch >= (3 if case.is_file else 15)


def write_and_be_killed(case: Case, target: Path, number: int) -> None:
    """SIGKILL in the middle of that system call if it is a write, just before it (after the last) if not."""

    def act(current: int, name: str, perform: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        if current != number:
            return perform()
        if name == "write":
            os.pwritev(args[0], [bytes(args[1])[: len(args[1]) // 2]], os.lseek(args[0], 0, os.SEEK_CUR))
        return os.kill(os.getpid(), signal.SIGKILL)

    with Calls(act):
        case.write(target, NEW, replace=case.replaces)


def write_and_raise(
    case: Case, target: Path, number: int, error: BaseException, reached: list[str], *, after: bool = False
) -> None:
    """Raise `error` from the system call of that number, whose name goes into `reached`."""

    def act(current: int, name: str, perform: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        if current != number:
            return perform()
        reached.append(name)
        if after:
            perform()
        raise error

    with Calls(act):
        case.write(target, NEW, replace=case.replaces)


def test_refused_at_any_system_call_a_writer_says_so_and_leaves_the_old_version(
    case: Case, scratch: Path
) -> None:
    errors: list[UserError] = []
    for number in count(1):
        target = prepared(case, scratch / str(number))
        reached: list[str] = []

        try:
            write_and_raise(case, target, number, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), reached)
            expected = {"new"}  # what was refused was only tidying up
        except UserError as error:
            errors.append(error)
            expected = {"old" if case.replaces else "nothing"}

        if case.is_file and case.replaces and reached == ["fsync"]:
            expected.add("new")  # it took the name in one step; whether that is on disk, nobody can tell
        assert case.found(target) in expected
        assert_next_write_tidies_up(case, target)
        if not reached:
            break

    assert len(errors) >= (4 if case.is_file else 20)
    assert {error.exit_code for error in errors} == {5}
    assert all(
        f"{target.name}: cannot be written, the disk has too little room" in str(error) for error in errors
    )


@pytest.mark.parametrize("after", [False, True])
def test_interrupted_from_the_keyboard_a_writer_leaves_one_version_and_the_interrupt_travels(
    case: Case, after: bool, scratch: Path
) -> None:
    for number in count(1):
        target = prepared(case, scratch / str(number))
        reached: list[str] = []

        try:
            write_and_raise(case, target, number, KeyboardInterrupt(), reached, after=after)
            came_through = True
        except KeyboardInterrupt:
            came_through = False

        assert came_through == (reached == [])
        assert case.found(target) in ("new", "old" if case.replaces else "nothing")
        assert_next_write_tidies_up(case, target)
        if came_through:
            break
    assert number > (5 if case.is_file else 20)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to name descriptors")
def test_everything_is_on_disk_before_the_rename_and_the_rename_before_the_end(
    case: Case, scratch: Path
) -> None:
    target = prepared(case, scratch if case.replaces else scratch / "made" / "on the way")
    log: list[tuple[str, Path]] = []

    def note(number: int, name: str, perform: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        is_descriptor = isinstance(args[0], int)
        log.append((name, Path(f"/proc/self/fd/{args[0]}").readlink() if is_descriptor else Path(args[0])))
        return perform()

    with Calls(note):
        case.write(target, NEW, replace=case.replaces)

    moves = [index for index, (name, _) in enumerate(log) if name in ("rename", "_renameat2")]
    before, after = log[: moves[0]], log[moves[-1] + 1 :]
    unsynced: set[Path] = set()
    for name, path in before:
        if name in ("open", "mkdir"):
            unsynced |= {path, path.parent}
        elif name == "write":
            unsynced.add(path)
        elif name == "fsync":
            unsynced.discard(path)
    assert unsynced - {target.parent} == set()
    assert after[0] == ("fsync", target.parent)
    if not case.is_file:
        synced = [path.name for name, path in before if name == "fsync"]
        assert sorted(synced[-6:-3]) == ["added.txt", "model.bin", "vocab.txt"]
        assert synced[-3:-1] == ["manifest.json", "tokenizer"]
        assert synced[-1].startswith(".step_000003.tmp-")
        assert ("unlink" in [name for name, _ in after]) == case.replaces
