"""W&B gets the rows of `metrics.jsonl`, and whatever its server does, the run does not notice."""

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from durable import UserError
from wrinklefree.config import load_config
from wrinklefree.config.schema import WandBConfig
from wrinklefree.run import run
from wrinklefree.runs import read_metrics
from wrinklefree.training.metrics import MetricsWriter
from wrinklefree.training.wandb_process import WandBProcess, require_wandb
from wrinklefree.training.wandb_tracker import InferenceMetrics, WandBTracker, create_inference_tracker

CANARY = "c0ffee" * 6 + "dead"


@contextmanager
def fake_server(get: int | None, post: int | None = 500) -> Iterator[str]:
    """Answers with these statuses; None never answers."""
    is_over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int | None) -> None:
            if status is None:
                is_over.wait(60)
                return
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b'{"data":{}}')

        def do_GET(self) -> None:
            self.answer(get)

        def do_POST(self) -> None:
            self.answer(post)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    is_over.set()
    server.shutdown()


def records(path: Path) -> Iterator[bytes]:
    """Of a LevelDB log: 7 bytes, then blocks of 32 kB with pieces of (crc 4, length 2, kind 1, bytes)."""
    content, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # too short for a head: padding
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


def offline_rows(directory: Path) -> list[dict[str, Any]]:
    """What the files hold that `wandb sync` would send."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    (path,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    for data in records(path):
        record: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            cells = {item.key or ".".join(item.nested_key): item for item in record.history.item}
            rows.append({name: json.loads(item.value_json) for name, item in cells.items() if name[0] != "_"})
    return rows


def flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in row.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def train(output_dir: Path, *overrides: str) -> Path:
    small = [
        "experiment=quick",
        "training.influence.enabled=false",
        "training.validation.num_batches=0",
        "training.max_seq_length=16",
        "training.max_steps=3",
        "training.checkpoint.save_at_end=false",
        "training.logging.wandb.timeout_seconds=1",
    ]
    return run(load_config([*small, f"output_dir={output_dir}", *overrides])).directory


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, with nobody watching."""
    return train(tmp_path_factory.mktemp("without"))


@pytest.mark.parametrize(("get", "post"), [(500, 500), (None, None), (200, 500), (200, None)])
@pytest.mark.slow
def test_a_server_that_fails_or_never_answers_does_not_touch_the_run(
    get: int | None,
    post: int | None,
    without: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    with fake_server(get, post) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        directory = train(tmp_path, "training.logging.wandb.enabled=true")

    watched, alone = (read_metrics(path / "metrics.jsonl") for path in (directory, without))
    for name in ("loss", "losses", "grad_norm", "samples"):
        assert [row[name] for row in watched] == [row[name] for row in alone]
    said = capfd.readouterr().out + caplog.text
    assert "offline" in said or "took too long" in said
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in said


@pytest.mark.slow
def test_without_a_server_every_row_is_in_offline_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    metrics = tmp_path / "metrics.jsonl"
    before = MetricsWriter(metrics)
    before.write("step", {"step": 1, "loss": 9.0})  # of a life that has told it already
    before.close()

    process = WandBProcess.start({"api_key": CANARY}, WandBConfig(enabled=True), tmp_path)
    writer = MetricsWriter(metrics)
    writer.write("step", {"step": 2, "loss": 0.1, "losses": {"dlm": 0.25}, "samples": [3], "skipped": False})
    writer.write("val", {"step": 2, "losses": {"now": {"web": 1.5}}})
    writer.write("step", {"step": 3, "loss": float("nan"), "losses": {"dlm": 0.5}})
    writer.close()
    process.close()

    assert [flat(row) for row in offline_rows(tmp_path)] == [
        {"step": 2, "loss": 0.1, "losses.dlm": 0.25, "skipped": False},
        {"step": 2, "val.losses.now.web": 1.5},
        {"step": 3, "loss": "nan", "losses.dlm": 0.5},
    ]
    assert caplog.text == ""  # it ended by itself and in time
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes()


def test_all_lives_of_a_run_are_one_run_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    config = {"model": {"name": "tiny"}}
    for _ in range(2):
        (tmp_path / "metrics.jsonl").touch()
        WandBProcess.start(config, WandBConfig(enabled=True), tmp_path).close()
    first = json.loads((tmp_path / "wandb.json").read_text())

    WandBProcess.start(config, WandBConfig(enabled=True), tmp_path).close()

    assert json.loads((tmp_path / "wandb.json").read_text()) == first
    assert first["name"].startswith("tiny-")


def test_a_process_that_hangs_is_ended_with_all_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # `wandb` of this folder sleeps when imported, beside a child of its own.
    (tmp_path / "wandb.py").write_text(
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr("wrinklefree.training.wandb_process.GRACE_SECONDS", 0.2)
    process = WandBProcess.start({}, WandBConfig(enabled=True, timeout_seconds=0.1), tmp_path)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)

    with caplog.at_level(logging.WARNING):
        process.close()

    assert "took too long" in caplog.text
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] in "ZX"


def test_wanted_but_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    require_wandb(WandBConfig(enabled=False))
    with pytest.raises(UserError, match=r"wrinklefree\[wandb\]") as caught:
        require_wandb(WandBConfig(enabled=True))

    assert caught.value.exit_code == 2


def test_a_tracker_that_is_switched_off_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for tracker in (WandBTracker(enabled=False), create_inference_tracker("bitnet-2b", "i2_s", 4096, 16)):
        assert tracker.init_training_run({"model": {"name": "tiny"}}) is None
        tracker.log_training_step({"loss": 0.5})
        tracker.log_summary({"best": 1.0})
        tracker.finish()
        assert tracker.place == "off"


@pytest.mark.slow
def test_a_measurement_of_inference_is_logged_by_topic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = create_inference_tracker("bitnet-2b", "i2_s", 4096, 16, directory=tmp_path)

    tracker.log_inference_metrics(
        InferenceMetrics(
            tokens_per_sec_prompt=100.0,
            tokens_per_sec_gen=25.0,
            latency_first_token_ms=10.0,
            latency_per_token_ms=40.0,
            peak_memory_gb=0.5,
            num_threads=16,
            batch_size=1,
            model_name="bitnet-2b",
            quant_type="i2_s",
            context_size=4096,
            extra={"joules": 3.0},
        )
    )
    tracker.finish()

    deadline = time.monotonic() + 20  # the library's own process may still be writing
    while not (rows := offline_rows(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    (row,) = rows
    assert row["inference/tokens_per_sec_gen"] == 25.0
    assert row["inference/joules"] == 3.0
    assert row["config/context_size"] == 4096
    assert not any(name.startswith("moe/") for name in row)
