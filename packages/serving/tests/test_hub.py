"""`export hub` against a server that has what the hub's client asks for: the files that the dry run named
arrive, and no token is ever printed.
"""

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from bitnet_serving.cli import main
from bitnet_serving.testing import save_tiny

TOKEN = "hf_" + "CanaryOfTheHub" * 2


@dataclass
class Hub:
    """What a repository has been sent."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    refuses: bool = False


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The repository `o/n` of a small server, which a client with HF_TOKEN finds."""
    state = Hub()

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer("GET", b"")

        def do_POST(self) -> None:
            self._answer("POST", self.rfile.read(int(self.headers["Content-Length"])))

        def _answer(self, method: str, body: bytes) -> None:
            path = self.path.split("?")[0]
            state.requests.append(f"{method} {path}")
            state.tokens.add(self.headers.get("Authorization"))
            if state.refuses:
                self._send({"error": f"Invalid credentials {self.headers.get('Authorization')}"}, 401)
            elif path.endswith("/repos/create"):
                self._send({"url": f"{state.address}/o/n", "name": "o/n"})
            elif path.endswith("/preupload/main"):
                names = [file["path"] for file in json.loads(body)["files"]]
                self._send(
                    {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
                )
            elif path.endswith("/commit/main"):
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        state.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self._send({"commitUrl": f"{state.address}/o/n/commit/1", "commitOid": "1" * 40})
            elif "/tree/" in path:
                self._send([])
            else:
                self._send({"id": "o/n", "sha": "1" * 40, "siblings": []})

        def _send(self, content: Any, status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Tests print nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    # The library reads HF_ENDPOINT when it is imported.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", state.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("made") / "model")


def test_what_the_dry_run_names_is_what_arrives(
    checkpoint: Path, hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["export", "hub", str(checkpoint), "o/n", "--packed"]

    dry = main(argv=[*command, "--dry-run"])
    told = capfd.readouterr()
    asked_by_dry_run = list(hub.requests)
    sent = main(argv=command)

    assert (dry, sent, asked_by_dry_run) == (0, 0, [])
    first, *lines = told.out.splitlines()
    assert first.startswith("dry run, nothing was sent; ")
    assert first.endswith(f" would go to {hub.address}/o/n")
    named = {name: int(size.replace(",", "")) for name, size, _ in map(str.split, lines)}
    assert named == {name: len(content) for name, content in hub.files.items()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "manifest.json"} <= set(named)
    assert f"Bearer {TOKEN}" in hub.tokens
    assert TOKEN not in "".join([*told, *capfd.readouterr()])


def test_a_refused_token_is_one_line_without_it(
    checkpoint: Path, hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.refuses = True

    code = main(argv=["export", "hub", str(checkpoint), "o/n"])

    out, err = capfd.readouterr()
    assert (code, out, err.count("\n")) == (5, "", 1)
    assert err.startswith("error: o/n: cannot be uploaded (found ")
    assert TOKEN not in err
    assert hub.files == {}


def test_without_a_token_or_a_network_it_is_one_line(
    checkpoint: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    command = ["export", "hub", str(checkpoint), "o/n"]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    unreachable = main(argv=command)
    network = capfd.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    nameless = main(argv=command)
    token = capfd.readouterr().err

    assert (unreachable, network.count("\n")) == (5, 1)
    assert "Connection refused" in network
    assert (nameless, token.count("\n")) == (5, 1)
    assert "no token" in token


@pytest.mark.parametrize("name", ["n", "a/b/c", "o/", "o/n..", "../n"])
def test_what_is_no_name_on_the_hub_is_one_line(
    name: str, checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = main(argv=["export", "hub", str(checkpoint), name, "--dry-run"])

    assert code == 2
    assert "give ORG/NAME" in capfd.readouterr().err
