"""`wrinklefree generate`, `chat`, `serve` and `bench` on a .gguf file, by the real engine."""

import io
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from bitnet_serving.testing import write_tiny_gguf

SPEED = re.compile(r"(\d+) tokens in [\d.]+ s, [\d.]+ tokens/s\n")
STOP_SECONDS = 30
"""A limit for a machine with much else to do; what is measured is the exit code."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_generate_prints_what_the_engine_writes(wrinklefree: Callable[..., Any], tiny: Path) -> None:
    streamed = wrinklefree("generate", tiny, "-p", "the fox", "-p", "a dog", "--max-new-tokens", 9)
    whole = wrinklefree(
        "generate", tiny, "-p", "the fox", "-p", "a dog", "--max-new-tokens", 9, "--no-stream"
    )

    assert (streamed.exit_code, whole.exit_code) == (0, 0)
    assert streamed.out == whole.out
    speed = SPEED.search(streamed.err)
    assert speed is not None
    assert speed[1] == "18"


def test_chat_answers_each_line_with_what_was_said_before(
    wrinklefree: Callable[..., Any], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the fox\n\nthe dog\n/exit\nnever\n"))
    ended = wrinklefree("chat", tiny, "--max-new-tokens", 7)
    said = wrinklefree("generate", tiny, "-p", "user: the fox\nassistant:", "--max-new-tokens", 7)
    first = said.out.removesuffix("\n")
    history = f"user: the fox\nassistant: {first}\nuser: the dog\nassistant:"
    second = wrinklefree("generate", tiny, "-p", history, "--max-new-tokens", 7).out

    assert (ended.exit_code, ended.out) == (0, f"{first}\n{second}")


def test_chat_forgets_the_oldest_turns_when_there_is_no_room(
    wrinklefree: Callable[..., Any], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'x ' * 70}\n{'y ' * 70}\n{'z ' * 300}\nthe\n"))

    ended = wrinklefree("chat", tiny, "--max-new-tokens", 3)

    assert ended.exit_code == 0
    assert ended.out.count("\n") >= 3
    assert ended.err.count("the oldest turn is forgotten") >= 1
    assert ended.err.count("error: prompt: longer than the model's positions") == 1


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (
            ["-p", "a", "--mode", "diffusion"],
            2,
            "error: mode: an engine writes token after token",
        ),
        (["-p", "the " * 400], 2, "error: prompt: longer than the model's positions"),
    ],
)
def test_what_an_engine_cannot_do_is_one_line(
    wrinklefree: Callable[..., Any], tiny: Path, options: list[str], code: int, said: str
) -> None:
    ended = wrinklefree("generate", tiny, *options)

    assert (ended.exit_code, ended.out, ended.err.count("\n")) == (code, "", 1)
    assert ended.err.startswith(said)


def test_chat_needs_a_template(wrinklefree: Callable[..., Any], tmp_path: Path) -> None:
    ended = wrinklefree("chat", write_tiny_gguf(tmp_path / "plain.gguf", template=False))

    assert ended.exit_code == 2
    assert "its tokenizer has no chat template" in ended.err


def test_bench_prints_json(wrinklefree: Callable[..., Any], tiny: Path) -> None:
    ended = wrinklefree("bench", tiny, "--prompt-tokens", 20, "--new-tokens", 10, "--rounds", 1, "--json")

    assert ended.exit_code == 0
    assert json.loads(ended.out)["new_tokens"] == 10


def serving(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "wrinklefree", "serve", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children(pid: int) -> list[int]:
    """The processes that it started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def address(server: subprocess.Popen[str]) -> str:
    """Where it says that it listens."""
    assert server.stdout is not None
    line = server.stdout.readline()
    found = re.search(r"http://\S+/v1", line)
    assert found is not None, line
    return found[0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_server_mid_generation_and_its_engine_with_it(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    model = write_tiny_gguf(tmp_path / "long.gguf", context=65_536)
    with serving(model, "--port", 0, "--context", 65_536, "--slots", 1, "--threads", 1) as server:
        client = openai.OpenAI(base_url=address(server), api_key="any", max_retries=0)
        stream = client.completions.create(
            model="any", prompt="a", max_tokens=60_000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        engine = children(server.pid)

        server.send_signal(number)
        _, err = server.communicate(timeout=STOP_SECONDS)

    assert server.returncode == code
    assert err in ("", "interrupted\n")
    assert len(engine) == 1
    assert not Path(f"/proc/{engine[0]}").exists()


def test_an_engine_does_not_outlive_a_server_that_is_killed(tiny: Path) -> None:
    with serving(tiny, "--port", 0) as server:
        address(server)
        engine = os.pidfd_open(children(server.pid)[0])

        server.kill()

        ended, _, _ = select.select([engine], [], [], STOP_SECONDS)
    assert ended == [engine]
    os.close(engine)


def test_a_taken_port_is_one_line_and_exit_3(wrinklefree: Callable[..., Any], tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = wrinklefree("serve", tiny, "--port", taken.getsockname()[1])

    assert (ended.exit_code, ended.out, ended.err.count("\n")) == (3, "", 1)
    assert "cannot be listened on" in ended.err


def test_another_host_than_this_machine_is_warned_about(tiny: Path) -> None:
    with serving(tiny, "--port", 0, "--host", "0.0.0.0") as server:
        address(server)
        server.terminate()
        _, err = server.communicate(timeout=STOP_SECONDS)

    assert err.startswith("warning: other machines can reach this server")
    assert server.returncode == 143
