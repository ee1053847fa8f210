"""Every preset runs: as a chain, each stage from the nearest one before it, and each one alone."""

import hashlib
import http.server
import json
import re
import shutil
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from wrinklefree.config import load_config
from wrinklefree.run import RunResult, run
from wrinklefree.runs import read_metrics

CHAIN = {
    "stage1_subln": "stage1",
    "stage1_9_layerwise": "stage1_9",
    "stage2_pretrain": "stage2",
    "stage3_distill": "stage3",
    "lrc_calibration": "lrc",
}
PRESETS = [*CHAIN, "unified", "base", "bitdistill_full"]
SMALL = [
    "model=tiny_llama",
    "data=demo",
    "training.max_seq_length=32",
    "training.batch_size=2",
    "training.gradient_accumulation_steps=1",
    "training.validation.num_batches=0",
    "training.max_steps=2",
    "training.checkpoint.save_interval=1",
    "experiment_name=chain",
]


def train(preset: str, output_dir: Path, *overrides: str) -> RunResult:
    return run(load_config([*SMALL, f"training={preset}", f"output_dir={output_dir}", *overrides]))


def losses(result: RunResult) -> list[float]:
    return [row["loss"] for row in read_metrics(result.directory / "metrics.jsonl")]


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, RunResult]]:
    """All stages one after the other, and what they are."""
    place = tmp_path_factory.mktemp("chain")
    return place, {preset: train(preset, place) for preset in CHAIN}


@pytest.mark.slow
def test_each_stage_follows_the_one_before_it_and_can_be_resumed(
    chained: tuple[Path, dict[str, RunResult]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, results = chained
    stages = list(CHAIN.values())
    shutil.copytree(place, tmp_path / "again")
    for number, (preset, result) in enumerate(results.items()):
        assert result.exit_code == 0
        assert result.directory.name == f"{stages[number]}_checkpoint"
        stage = tmp_path / "again" / "checkpoints" / "chain" / result.directory.name
        rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
        started = [row for row in rows if row.get("event") == "resumed"]
        if number:
            (event,) = started
            assert event["origin"] == "stage"
            assert f"/{stages[number - 1]}_checkpoint/checkpoints/final" in event["from"]
        for name in ("final", "step_000002"):
            shutil.rmtree(stage / "checkpoints" / name)

        resumed = train(preset, tmp_path / "again")

        assert "resuming after step 1" in capsys.readouterr().out
        assert losses(resumed) == losses(result)
        assert len(losses(resumed)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_starts_alone(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(preset, tmp_path, "training.max_steps=1")

    assert result.exit_code == 0
    assert len(losses(result)) == 1
    said = capsys.readouterr().out
    assert ("starts from tiny_llama: no checkpoint of" in said) == (preset in list(CHAIN)[1:])


@pytest.mark.slow
def test_a_stage_is_found_in_a_bucket(
    chained: tuple[Path, dict[str, RunResult]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = tmp_path / "bucket"
    wanted = ("gcs.enabled=true", f"gcs.bucket=file://{bucket}")
    train("stage2_pretrain", tmp_path / "one", *wanted)
    capsys.readouterr()

    result = train("stage3_distill", tmp_path / "other", *wanted)

    assert result.exit_code == 0
    assert re.search(r"stage3 follows stage2: .*final", capsys.readouterr().out)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What a small server shows as the repository `o/n`."""
    root = tmp_path / "hub"
    root.mkdir()

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            if path.startswith("/o/n/resolve/main/"):
                self._send((root / path.removeprefix("/o/n/resolve/main/")).read_bytes())
            elif path.startswith("/api/models/o/n/tree/main/"):
                folder = root / path.removeprefix("/api/models/o/n/tree/main/")
                if folder.is_dir():
                    self._send([_entry(each, root) for each in sorted(folder.iterdir())])
                else:
                    self.send_error(404)
            elif path.startswith("/api/models/o/n"):
                self._send({"id": "o/n", "modelId": "o/n", "sha": "1" * 40, "siblings": []})
            else:
                self.send_error(404)

        def _send(self, content: Any) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Tests print nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    # The library reads HF_ENDPOINT when it is imported.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield root
    server.shutdown()


def _entry(path: Path, root: Path) -> dict[str, Any]:
    kind = "directory" if path.is_dir() else "file"
    size = 0 if path.is_dir() else path.stat().st_size
    return {"type": kind, "path": str(path.relative_to(root)), "size": size, "oid": "0" * 40}


@pytest.mark.slow
def test_a_stage_is_found_on_the_hub(
    chained: tuple[Path, dict[str, RunResult]],
    hub: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place, results = chained
    stage = results["stage2_pretrain"].directory
    shutil.copytree(stage, hub / stage.relative_to(place))
    capsys.readouterr()

    result = train("stage3_distill", tmp_path / "empty", "hub.repo=o/n")

    assert result.exit_code == 0
    assert re.search(r"stage3 follows stage2: .*/cache/wrinklefree/.*final", capsys.readouterr().out)
