"""Servers of the test's own that answer, stall or refuse: expected is one line, in time, and no other source.

No test waits for the real limit of 50 seconds: it is set to one, and a hang fails by the timeout of the test.
"""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_handler import reaching
from data_handler.config import DataConfig, SourceConfig, SourceFormat
from data_handler.opening import BLOCK_BYTES
from data_handler.prepare import prepare
from data_handler.shards import Shards
from durable import UserError

BODY = b"".join(
    json.dumps({"text": f"line {number} " + "x" * 200}).encode() + b"\n" for number in range(9000)
)
assert len(BODY) > 1.5 * BLOCK_BYTES


@contextmanager
def silent_server() -> Iterator[int]:
    """Accepts, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


class Files(BaseHTTPRequestHandler):
    """Serves BODY in ranges; as /stalls.jsonl, it stops in the middle of its second block."""

    paths: list[str] = []  # noqa: RUF012 -- a class for each server

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def _answer(self, *, send: bool) -> None:
        self.paths.append(self.path)
        if self.path.startswith("/forbidden"):
            self.send_error(403)
            return
        if self.path.startswith("/missing"):
            self.send_error(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), min(int(asked[2]), len(BODY) - 1)) if asked else (0, len(BODY) - 1)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last + 1 - first))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(BODY)}")
        self.end_headers()
        if not send:
            return
        part = BODY[first : last + 1]
        if self.path.startswith("/stalls") and 0 < first < len(BODY) - 2**16:
            self.wfile.write(part[: 2**16])
            self.wfile.flush()
            time.sleep(30)
            return
        self.wfile.write(part)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    kind = type("Files", (Files,), {"paths": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def _short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reaching, "TIMEOUT_SECONDS", 1.5)


def prepare_one(out: Path, path: str, **settings: object) -> None:
    source = SourceConfig(path=path, **settings)  # type: ignore[arg-type]
    prepare(DataConfig(name="t", sources={"s": source}, piece_bytes=BLOCK_BYTES), out)


def test_a_file_is_read_over_http_in_pieces(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    prepare_one(tmp_path / "http", f"http://127.0.0.1:{server.server_port}/a.jsonl")

    (tmp_path / "a.jsonl").write_bytes(BODY)
    prepare_one(tmp_path / "local", str(tmp_path / "a.jsonl"))
    over_http, local = (Shards.open(tmp_path / name / "s/train") for name in ("http", "local"))
    assert over_http.num_documents == local.num_documents == 9000
    assert over_http.tokens(0, over_http.num_tokens).tolist() == local.tokens(0, local.num_tokens).tolist()


def test_a_server_that_never_answers_is_one_line(tmp_path: Path) -> None:
    with silent_server() as port, pytest.raises(UserError) as caught:
        prepare_one(tmp_path / "out", f"http://user:hunter2hunter2@127.0.0.1:{port}/a.jsonl")

    assert caught.value.exit_code == 4
    assert f"127.0.0.1:{port}/a.jsonl: cannot be reached (found no answer for 2 seconds)" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out/s").exists()


def test_a_server_that_stalls_in_the_middle_is_one_line(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    with pytest.raises(UserError, match=r"/stalls\.jsonl: cannot be reached .*no answer") as caught:
        prepare_one(tmp_path / "out", f"http://127.0.0.1:{server.server_port}/stalls.jsonl")

    assert caught.value.exit_code == 4
    assert not (tmp_path / "out/s").exists()
    assert list((tmp_path / "out").glob(".prepare-s/*/piece-00000/manifest.json"))


@pytest.mark.parametrize(("name", "tries"), [("forbidden", 3), ("missing", 1)])
def test_a_server_that_refuses_is_asked_three_times_at_most(
    tmp_path: Path,
    server: ThreadingHTTPServer,
    name: str,
    tries: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reaching, "TIMEOUT_SECONDS", 20)
    address = f"http://127.0.0.1:{server.server_port}/{name}.jsonl?token=abcdef0123456789abcdef"

    with pytest.raises(UserError) as caught:
        prepare_one(tmp_path / "out", address)

    assert caught.value.exit_code == 4
    assert "abcdef0123456789" not in str(caught.value)
    asked = server.RequestHandlerClass.paths  # type: ignore[attr-defined]
    assert {path.partition("?")[0] for path in asked} == {f"/{name}.jsonl"}
    # fsspec asks with HEAD, then with GET, for each of our tries.
    assert len(asked) <= 2 * tries


def test_nothing_listens_is_one_line_and_no_other_source_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    sources = {
        "a": SourceConfig(path=f"http://127.0.0.1:{port}/a.jsonl"),
        "b": SourceConfig(path=str(tmp_path / "b.jsonl")),
    }

    with pytest.raises(UserError, match=rf"http://127\.0\.0\.1:{port}/a\.jsonl: cannot be reached") as caught:
        prepare(DataConfig(name="t", sources=sources), tmp_path / "out")

    assert caught.value.exit_code == 4
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.lock"]


@pytest.mark.parametrize("end", ["stalls", "breaks"])
def test_a_stream_that_ends_early_never_seems_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    class Stream:
        """What `datasets` returns for a dataset of one shard."""

        num_shards = 1

        def shard(self, num_shards: int, index: int) -> Iterator[dict[str, str]]:
            yield {"text": "first"}
            if end == "breaks":
                raise ConnectionError("reset by peer")
            time.sleep(30)

    for module in ("sources", "records"):
        monkeypatch.setattr(f"data_handler.{module}.open_stream", lambda source: Stream())

    with pytest.raises(UserError, match=r"owner/dataset: cannot be reached .*(no answer|reset by peer)"):
        prepare_one(tmp_path / "out", "owner/dataset", format=SourceFormat.HF)
    assert not (tmp_path / "out/s").exists()
