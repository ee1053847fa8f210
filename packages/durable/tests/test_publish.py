"""What publishing promises when nothing goes wrong, and what it refuses to touch."""

import os
import stat
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from durable import UserError, error_line, publish, publish_file, renaming, verify


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def test_a_directory_appears_whole_with_a_manifest_of_what_was_written(tmp_path: Path) -> None:
    target = tmp_path / "made" / "on the way" / "step_000003"

    with publish(target, metadata={"step": 3}) as temporary:
        (temporary / "model.bin").write_bytes(b"abc")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "vocab.txt").write_text("d")
        assert not target.exists()

    manifest = verify(target)
    assert list(manifest.files) == ["model.bin", "sub/vocab.txt"]
    assert manifest.files["model.bin"].size == 3
    # `printf abc | sha256sum`
    assert (
        manifest.files["model.bin"].sha256
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    assert manifest.num_bytes == 4
    assert manifest.metadata == {"step": 3}
    assert names_in(target.parent) == ["step_000003"]


def test_metadata_is_read_when_the_block_ends(tmp_path: Path) -> None:
    metadata: dict[str, object] = {"step": 3}

    with publish(tmp_path / "out", metadata=metadata):
        metadata["loss"] = 0.1 + 0.2

    assert verify(tmp_path / "out").metadata == {"step": 3, "loss": 0.1 + 0.2}


@pytest.mark.parametrize("metadata", [{"x": float("nan")}, {"x": object()}])
def test_metadata_that_json_cannot_hold_is_refused_before_anything_is_written(
    metadata: dict[str, object], tmp_path: Path
) -> None:
    with pytest.raises((TypeError, ValueError)), publish(tmp_path / "out", metadata=metadata):
        pytest.fail("the block must not be entered")

    assert list(tmp_path.iterdir()) == []


Writer = Callable[..., AbstractContextManager[Path]]


def write(writer: Writer, target: Path, action: Callable[[Path], object]) -> None:
    with writer(target) as temporary:
        action(temporary)


@pytest.mark.parametrize("writer", [publish, publish_file])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, FileNotFoundError, PermissionError])
def test_an_exception_travels_unchanged_and_leaves_nothing(
    writer: Writer, kind: type[BaseException], tmp_path: Path
) -> None:
    def fail_halfway(temporary: Path) -> None:
        (temporary / "half.bin" if temporary.is_dir() else temporary).write_bytes(b"x")
        raise kind("mine")

    with pytest.raises(kind, match="mine"):
        write(writer, tmp_path / "out", fail_halfway)

    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_kept_unless_replacing_it_was_asked_for(tmp_path: Path) -> None:
    with publish(tmp_path / "dir") as temporary:
        (temporary / "a").write_bytes(b"1")
    with publish_file(tmp_path / "file") as temporary:
        temporary.write_bytes(b"1")

    with pytest.raises(UserError, match="dir: exists already") as directory_error, publish(tmp_path / "dir"):
        pytest.fail("the block must not be entered")
    with (
        pytest.raises(UserError, match="file: exists already") as file_error,
        publish_file(tmp_path / "file"),
    ):
        pytest.fail("the block must not be entered")
    assert (directory_error.value.exit_code, file_error.value.exit_code) == (5, 5)

    with publish(tmp_path / "dir", replace=True) as temporary:
        (temporary / "b").write_bytes(b"22")
    with publish_file(tmp_path / "file", replace=True) as temporary:
        temporary.write_bytes(b"22")
    assert list(verify(tmp_path / "dir").files) == ["b"]
    assert (tmp_path / "file").read_bytes() == b"22"
    assert names_in(tmp_path) == ["dir", "file"]


def test_a_directory_that_nobody_published_is_never_replaced(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("all of it")

    with (
        pytest.raises(UserError, match=r"home: has no manifest\.json") as caught,
        publish(home, replace=True),
    ):
        pytest.fail("the block must not be entered")

    assert caught.value.exit_code == 5
    assert contents(home) == {"thesis.tex": b"all of it"}


def test_an_empty_directory_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    with publish(tmp_path / "out") as temporary:
        (temporary / "a").write_bytes(b"1")

    assert list(verify(tmp_path / "out").files) == ["a"]


@pytest.mark.parametrize("has_renameat2", [True, False])
def test_what_appears_at_the_target_meanwhile_is_not_overwritten(
    has_renameat2: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_renameat2:
        monkeypatch.setattr(renaming, "_renameat2", lambda source, target, flags: False)

    with pytest.raises(UserError, match="file: exists already"):
        write(publish_file, tmp_path / "file", lambda _: (tmp_path / "file").write_text("theirs"))
    with pytest.raises(UserError, match="dir: exists already"):
        write(
            publish,
            tmp_path / "dir",
            lambda _: write(publish, tmp_path / "dir", lambda it: (it / "b").touch()),
        )

    assert (tmp_path / "file").read_text() == "theirs"
    assert list(verify(tmp_path / "dir").files) == ["b"]
    assert names_in(tmp_path) == ["dir", "file"]


@pytest.mark.parametrize(("name", "writer"), [("file", publish_file), ("dir", publish)])
@pytest.mark.parametrize("has_renameat2", [True, False])
def test_what_appears_at_the_last_moment_is_not_overwritten_either(
    has_renameat2: bool, name: str, writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_renameat2:
        monkeypatch.setattr(renaming, "_renameat2", lambda source, target, flags: False)
    monkeypatch.setattr(sys.modules["durable.publish"], "_require_free_name", lambda final, replace: None)
    monkeypatch.setattr(sys.modules["durable.publish"], "_require_replaceable", lambda final, replace: None)

    def theirs(_: Path) -> None:
        (tmp_path / "dir").mkdir()
        (tmp_path / "dir" / "theirs").touch()
        (tmp_path / "file").write_text("theirs")

    with pytest.raises(UserError, match="something else took its name meanwhile"):
        write(writer, tmp_path / name, theirs)

    assert (tmp_path / "file").read_text() == "theirs"
    assert names_in(tmp_path / "dir") == ["theirs"]
    assert names_in(tmp_path) == ["dir", "file"]


def test_a_target_that_is_a_file_a_directory_or_a_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dir").mkdir()

    for target, writer in [
        (tmp_path / "file", publish),
        (tmp_path / "file" / "below", publish),
        (tmp_path / "dir", publish_file),
        (Path("/dev/null"), publish_file),
        (tmp_path / ("n" * 250), publish),
        (Path("/"), publish),
    ]:
        with pytest.raises(UserError) as caught, writer(target, replace=True):
            pytest.fail("the block must not be entered")
        assert caught.value.exit_code == 5
        assert "fix: " in error_line(caught.value)
    assert names_in(tmp_path) == ["dir", "file"]


def test_a_link_to_the_target_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "big disk").mkdir()
    (tmp_path / "out").symlink_to("big disk/out")

    with publish(tmp_path / "out") as temporary:
        assert temporary.parent == tmp_path / "big disk"
        (temporary / "a").write_bytes(b"1")

    assert (tmp_path / "out").is_symlink()
    assert list(verify(tmp_path / "big disk" / "out").files) == ["a"]


@pytest.mark.parametrize(
    "name", ["link", "pipe", "manifest.json", "back\\slash", "new\nline", "sur\udc80rogate"]
)
def test_what_a_manifest_cannot_hold_is_refused_by_name(name: str, tmp_path: Path) -> None:
    def create(temporary: Path) -> None:
        if name == "link":
            (temporary / name).symlink_to(tmp_path)
        elif name == "pipe":
            os.mkfifo(temporary / name)
        else:
            (temporary / name).write_bytes(b"x")

    with pytest.raises(UserError, match="cannot be published") as caught:
        write(publish, tmp_path / "out", create)

    assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


def test_more_files_than_a_manifest_can_list_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["durable.publish"], "LARGEST_MANIFEST", 500)

    def touch_four(temporary: Path) -> None:
        for name in "abcd":
            (temporary / name).touch()

    with pytest.raises(UserError, match=r"out: needs a manifest of \d+ bytes for its 4 files"):
        write(publish, tmp_path / "out", touch_four)

    assert list(tmp_path.iterdir()) == []


def test_permissions_follow_the_umask_and_a_replaced_file_hands_its_own_on(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with publish(tmp_path / "dir"):
            pass
        with publish_file(tmp_path / "new"):
            pass
        (tmp_path / "secret").touch(mode=0o600)
        with publish_file(tmp_path / "secret", replace=True) as temporary:
            temporary.write_bytes(b"x")
    finally:
        os.umask(before)

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"dir": 0o750, "new": 0o640, "secret": 0o600}


def test_nothing_is_written_to_the_temporary_directory_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = Path("/dev/shm")
    if not os.access(elsewhere, os.W_OK) or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second filesystem at /dev/shm")
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = set(names_in(elsewhere))

    with publish(tmp_path / "dir") as temporary:
        (temporary / "a").write_bytes(b"1")
        assert temporary.stat().st_dev == tmp_path.stat().st_dev
        assert set(names_in(elsewhere)) == before
    with publish_file(tmp_path / "file") as temporary:
        assert (temporary.parent, temporary.stat().st_dev) == (tmp_path, tmp_path.stat().st_dev)


def test_many_files_are_published_in_reasonable_time(tmp_path: Path) -> None:
    started = time.monotonic()

    with publish(tmp_path / "out") as temporary:
        for index in range(300):
            (temporary / f"shard_{index:03}.bin").write_bytes(bytes([index % 251]) * index)

    assert len(verify(tmp_path / "out").files) == 300
    assert time.monotonic() - started < 30
