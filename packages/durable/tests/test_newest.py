"""The newest directory that is whole is found, and every newer one that is not is named with its reason."""

import os
from pathlib import Path

import pytest

from durable import Newest, UserError, newest_complete, publish


def publish_step(parent: Path, name: str, **metadata: object) -> Path:
    with publish(parent / name, metadata=metadata) as temporary:
        (temporary / "model.bin").write_bytes(name.encode())
    return parent / name


def set_time(directory: Path, seconds: int) -> None:
    os.utime(directory / "manifest.json", (seconds, seconds))


def test_nothing_published_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    (tmp_path / "empty" / "lost+found").mkdir()

    for parent in (tmp_path / "missing", tmp_path / "empty"):
        assert newest_complete(parent) == Newest(None, None, ())
        assert newest_complete(parent).or_raise().path is None


def test_the_largest_step_wins_whatever_its_digits_and_age(tmp_path: Path) -> None:
    for age, name in enumerate(["step_001000", "epoch=1-step=999", "global_step500", "checkpoint-2"]):
        set_time(publish_step(tmp_path, name), 1_700_000_000 + age)

    newest = newest_complete(tmp_path)

    assert (newest.path, newest.skipped) == (tmp_path / "step_001000", ())
    assert newest.manifest is not None
    assert list(newest.manifest.files) == ["model.bin"]


@pytest.mark.parametrize("later", ["step_000500", "final"])
def test_a_name_without_a_step_takes_it_from_its_metadata_and_at_equal_steps_the_later_one_wins(
    later: str, tmp_path: Path
) -> None:
    publish_step(tmp_path, "step_000500")
    publish_step(tmp_path, "final", step=500)
    for name in ("step_000500", "final"):
        set_time(tmp_path / name, 1_700_000_000 + (name == later))
    publish_step(tmp_path, "best", step=300)
    publish_step(tmp_path, "odd", step="900")

    assert newest_complete(tmp_path).path == tmp_path / later


def test_a_name_to_ignore_is_not_there(tmp_path: Path) -> None:
    publish_step(tmp_path, "best", step=9)
    older = publish_step(tmp_path, "step_000005")

    assert newest_complete(tmp_path, ignore=("best",)).path == older
    assert newest_complete(tmp_path, ignore=("best", "step_000005")) == Newest(None, None, ())


def test_without_any_step_the_latest_wins(tmp_path: Path) -> None:
    for seconds, name in [(30, "b"), (50, "a"), (40, "c")]:
        set_time(publish_step(tmp_path, name), 1_700_000_000 + seconds)

    assert newest_complete(tmp_path).path == tmp_path / "a"


def test_damaged_and_unfinished_ones_are_skipped_with_a_reason_newest_first(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        publish_step(tmp_path, f"step_{step:06}")
    os.truncate(tmp_path / "step_000005" / "model.bin", 3)
    (tmp_path / "step_000004" / "manifest.json").unlink()
    (tmp_path / "step_000003" / "model.bin").write_bytes(b"step_000033")
    (tmp_path / "step_000006").write_text("a file")
    (tmp_path / "step_000001" / "model.bin").unlink()

    newest = newest_complete(tmp_path).or_raise()

    assert newest.path == tmp_path / "step_000002"
    assert [skipped.path.name for skipped in newest.skipped] == [f"step_00000{step}" for step in (6, 5, 4, 3)]
    reasons = [skipped.reason for skipped in newest.skipped]
    for reason, expected in zip(
        reasons, ["not a directory", "is truncated", "manifest.json: is missing", "has changed"], strict=True
    ):
        assert expected in reason


def test_when_none_verifies_the_caller_gets_the_reasons_or_one_error(tmp_path: Path) -> None:
    publish_step(tmp_path, "step_000001")
    os.truncate(tmp_path / "step_000001" / "model.bin", 0)

    newest = newest_complete(tmp_path)
    with pytest.raises(UserError, match="holds nothing that verifies") as caught:
        newest.or_raise()

    assert (newest.path, newest.manifest, len(newest.skipped)) == (None, None, 1)
    assert caught.value.exit_code == 4
    assert "model.bin: is truncated" in str(caught.value)


def test_what_could_be_anything_is_reported_and_never_passed_over(tmp_path: Path) -> None:
    publish_step(tmp_path, "step_000007")
    publish_step(tmp_path, "final", step=9)
    os.truncate(tmp_path / "final" / "manifest.json", 20)

    newest = newest_complete(tmp_path)

    assert newest.path == tmp_path / "step_000007"
    assert [skipped.path.name for skipped in newest.skipped] == ["final"]


def test_links_to_neighbours_temporaries_and_files_are_not_candidates(tmp_path: Path) -> None:
    publish_step(tmp_path, "step_000001")
    (tmp_path / "latest").symlink_to("step_000001")
    (tmp_path / "gone").symlink_to("step_000000")
    (tmp_path / ".step_000002.tmp-0123abcd-1-0123abcd").mkdir()
    (tmp_path / "notes.txt").touch()

    assert newest_complete(tmp_path).path == tmp_path / "step_000001"
    assert newest_complete(tmp_path).skipped == ()
    (tmp_path / "step_000001" / "manifest.json").unlink()
    assert [skipped.path.name for skipped in newest_complete(tmp_path).skipped] == ["step_000001"]


def test_a_checkpoint_moved_to_another_disk_and_linked_still_counts(tmp_path: Path) -> None:
    publish_step(tmp_path / "run", "step_000001")
    publish_step(tmp_path / "other disk", "step_000002")
    (tmp_path / "run" / "step_000002").symlink_to(tmp_path / "other disk" / "step_000002")

    assert newest_complete(tmp_path / "run").path == tmp_path / "run" / "step_000002"


def test_a_file_for_a_parent_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(UserError, match="cannot be listed") as caught:
        newest_complete(tmp_path / "file")
    assert caught.value.exit_code == 4
