"""Checkpoints arrive at their address whole, beside the training, and a bucket that fails stops nothing."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from durable import UserError, publish, verify
from wrinklefree.config import load_config
from wrinklefree.run import RunResult, run
from wrinklefree.runs import read_metrics
from wrinklefree.training.uploading import Uploader, copy_checkpoint

SECRET = "hf_abcdefghijklmnop1234"
SMALL = [
    "experiment=quick",
    "training.influence.enabled=false",
    "training.validation.num_batches=0",
    "training.max_seq_length=32",
    "training.max_steps=3",
    "training.checkpoint.save_interval=2",
    "training.logging.log_interval=100",
    "gcs.enabled=true",
]


class Unreliable(MemoryFileSystem):  # type: ignore[misc]
    """Refuses the first writes, spoils others, or waits with all of them."""

    protocol = "unreliable"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    refusals = 0
    spoiled: ClassVar[set[str]] = set()
    may_write = threading.Event()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("unreliable://")))

    @classmethod
    def reset(cls) -> None:
        cls.store.clear()
        cls.spoiled.clear()
        cls.refusals = 0
        cls.may_write.set()

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        assert self.may_write.wait(60)
        if type(self).refusals > 0:
            type(self).refusals -= 1
            raise OSError(f"503 for the bearer of {SECRET}")
        super().put_file(lpath, rpath, **options)
        if Path(rpath).name in self.spoiled:
            self.spoiled.discard(Path(rpath).name)
            self.pipe_file(rpath, b"other bytes")


@pytest.fixture(autouse=True)
def _unreliable() -> Iterator[None]:
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    Unreliable.reset()
    yield
    Unreliable.reset()


def checkpoint(parent: Path, name: str = "step_000002", content: bytes = b"weights") -> Path:
    with publish(parent / name, replace=True) as directory:
        (directory / "model.safetensors").write_bytes(content)
        (directory / "tokenizer").mkdir()
        (directory / "tokenizer" / "vocabulary.json").write_text("{}")
    return parent / name


def uploader(tmp_path: Path) -> Uploader:
    return Uploader(
        Unreliable(),
        PurePosixPath("/bucket"),
        tmp_path / "metrics.jsonl",
        timeout_seconds=30,
        pause_seconds=0,
    )


def copied(tmp_path: Path, remote: str) -> Path:
    """What lies at the address, back on this disk, after every byte was checked."""
    target = tmp_path / "back"
    Unreliable().get(remote, str(target), recursive=True)
    verify(target)
    return target


def test_two_refusals_and_a_spoiled_file_are_tried_again(tmp_path: Path) -> None:
    Unreliable.refusals, Unreliable.spoiled = 1, {"model.safetensors"}
    copies = uploader(tmp_path)

    copies.submit(checkpoint(tmp_path))
    copies.finish()

    assert (copied(tmp_path, "/bucket/step_000002") / "model.safetensors").read_bytes() == b"weights"
    assert not (tmp_path / "metrics.jsonl").exists()


def test_what_a_short_outage_left_behind_is_copied_at_the_end(tmp_path: Path) -> None:
    Unreliable.refusals = 3
    copies = uploader(tmp_path)
    copies.submit(checkpoint(tmp_path))
    copies.wait()
    assert [path.name for path in copies.failed] == ["step_000002"]

    copies.finish()

    assert (copied(tmp_path, "/bucket/step_000002") / "model.safetensors").read_bytes() == b"weights"


def test_what_failed_and_was_replaced_by_newer_ones_is_not_missed(tmp_path: Path) -> None:
    Unreliable.refusals = 3
    copies = uploader(tmp_path)
    copies.submit(checkpoint(tmp_path))
    copies.wait()
    shutil.rmtree(tmp_path / "step_000002")

    copies.finish()

    assert copies.failed == {}


def test_a_third_failure_is_a_warning_and_a_row_without_secrets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Unreliable.refusals = 6  # three tries when it was written, three at the end
    copies = uploader(tmp_path)

    copies.submit(checkpoint(tmp_path))
    with pytest.raises(UserError, match=r"step_000002.*503") as caught:
        copies.finish()

    assert caught.value.exit_code == 5
    event, _ = read_metrics(tmp_path / "metrics.jsonl", kind="event")
    assert (event["event"], event["checkpoint"]) == ("upload_failed", "step_000002")
    assert "503" in caplog.text
    assert SECRET not in caplog.text + str(caught.value) + json.dumps(event)
    assert not Unreliable().exists("/bucket/step_000002/manifest.json")


def test_a_checkpoint_that_is_replaced_is_copied_anew_and_one_that_is_there_is_not(tmp_path: Path) -> None:
    target, filesystem = PurePosixPath("/bucket/best"), Unreliable()
    copy_checkpoint(filesystem, checkpoint(tmp_path, "best"), target)

    Unreliable.refusals = 100
    copy_checkpoint(filesystem, tmp_path / "best", target)
    with pytest.raises(OSError, match="503"):
        copy_checkpoint(filesystem, checkpoint(tmp_path, "best", b"better"), target)
    assert not filesystem.exists(str(target / "manifest.json"))  # half of each is none

    Unreliable.refusals = 0
    copy_checkpoint(filesystem, tmp_path / "best", target)
    assert (copied(tmp_path, str(target)) / "model.safetensors").read_bytes() == b"better"


def train(output_dir: Path, *overrides: str) -> RunResult:
    return run(load_config([*SMALL, f"output_dir={output_dir}", *overrides]))


def test_a_run_goes_on_while_its_bucket_hangs_and_keeps_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wrinklefree.lightning.module import WrinkleFreeLightningModule

    Unreliable.may_write.clear()
    usual = WrinkleFreeLightningModule.training_step

    def training_step(self: WrinkleFreeLightningModule, *arguments: Any) -> None:
        usual(self, *arguments)
        if self.progress.step == 3:
            Unreliable.may_write.set()

    monkeypatch.setattr(WrinkleFreeLightningModule, "training_step", training_step)
    result = train(
        tmp_path,
        "gcs.bucket=unreliable://bucket",
        "training.checkpoint.save_interval=1",
        "training.checkpoint.keep_last_n=1",
    )

    assert (result.step, result.exit_code) == (3, 0)
    folder = "/bucket/checkpoints/quick/base_checkpoint/checkpoints"
    names = {PurePosixPath(path).name for path in Unreliable().ls(folder, detail=False)}
    assert names == {"step_000001", "step_000002", "step_000003", "final"}
    copied(tmp_path, f"{folder}/final")


def test_what_is_missing_is_an_error_at_the_end_and_copied_by_the_same_command(tmp_path: Path) -> None:
    bucket, here = "gcs.bucket=unreliable://bucket", tmp_path / "run"
    Unreliable.refusals = 10**6
    with pytest.raises(UserError, match=r"gcs.bucket.*not copied") as caught:
        train(here, bucket)
    assert caught.value.exit_code == 5
    (metrics,) = here.rglob("metrics.jsonl")
    assert [row["step"] for row in read_metrics(metrics)] == [1, 2, 3]

    Unreliable.refusals = 0
    assert train(here, bucket).exit_code == 0

    copied(tmp_path, "/bucket/checkpoints/quick/base_checkpoint/checkpoints/final")


@pytest.mark.parametrize("bucket", ["nosuch://bucket", "null"])
def test_a_bucket_that_cannot_be_opened_is_exit_2(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gcs.bucket") as caught:
        train(tmp_path, f"gcs.bucket={bucket}")

    assert caught.value.exit_code == 2
