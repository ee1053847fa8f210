"""A served file as clients see it: the openai client, several at once, and those who behave badly."""

import contextlib
import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from bitnet_serving.client import BitNetClient
from bitnet_serving.front import LARGEST_BODY
from bitnet_serving.service import Service
from durable import ExitCode, UserError

HI: Any = [{"role": "user", "content": "the fox"}]
PATIENCE_SECONDS = 60
LONG, LONG_CONTEXT = 60_000, 65_536


@pytest.fixture(scope="module")
def service(tiny_gguf: Path) -> Iterator[Service]:
    with Service(tiny_gguf, port=0, threads=1) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0)


def port_of(service: Service) -> int:
    return int(service.url.rpartition(":")[2])


def ask(service: Service, method: str, path: str, body: bytes | str = b"", **headers: str) -> tuple[int, Any]:
    """Status and JSON of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(service), timeout=PATIENCE_SECONDS)
    with contextlib.closing(connection):
        connection.request(
            method, path, body, {name.replace("_", "-"): text for name, text in headers.items()}
        )
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"null")


def until(holds: Callable[[], object]) -> None:
    """Wait until it does."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.02)


def slots(service: Service) -> list[dict[str, Any]]:
    """What the engine says it is doing; the front does not pass that on."""
    engine = service._engine
    connection = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=PATIENCE_SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", "/slots", headers={"Authorization": f"Bearer {engine.settings.api_key}"})
        found: list[dict[str, Any]] = json.loads(connection.getresponse().read())
        return found


def test_completions_and_the_sum_of_a_stream_are_the_same_text(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="any", prompt="the quick", max_tokens=20, temperature=0)
    pieces = client.completions.create(
        model="any", prompt="the quick", max_tokens=20, temperature=0, stream=True
    )

    assert whole.usage is not None
    assert (whole.usage.completion_tokens, whole.choices[0].finish_reason) == (20, "length")
    assert whole.choices[0].text == "".join(piece.choices[0].text for piece in pieces)


def test_chat_applies_the_template_of_the_file(service: Service, client: openai.OpenAI) -> None:
    said = client.chat.completions.create(model="any", messages=HI, max_tokens=12, temperature=0)
    deltas = client.chat.completions.create(
        model="any", messages=HI, max_tokens=12, temperature=0, stream=True
    )
    plain = client.completions.create(
        model="any", prompt="user: the fox\nassistant:", max_tokens=12, temperature=0
    )

    assert said.choices[0].message.content == plain.choices[0].text
    assert said.choices[0].message.content == "".join(
        delta.choices[0].delta.content or "" for delta in deltas
    )


def test_health_and_models(service: Service, client: openai.OpenAI) -> None:
    assert ask(service, "GET", "/health") == (200, {"status": "ok"})
    assert [model.id for model in client.models.list()] == ["tiny.gguf"]


def test_eight_clients_at_once_get_the_answers_of_one(client: openai.OpenAI) -> None:
    def answer(number: int) -> str:
        asked = client.completions.create(
            model="any", prompt="abcdefgh"[number], max_tokens=15, temperature=0
        )
        return asked.choices[0].text

    alone = [answer(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(answer, range(8)))

    assert together == alone
    assert len(set(alone)) > 1


def test_a_client_that_leaves_mid_stream_frees_its_slot(long_gguf: Path) -> None:
    request = {"prompt": "the", "max_tokens": LONG, "ignore_eos": True, "stream": True}
    with Service(long_gguf, port=0, threads=1, context=LONG_CONTEXT, slots=1) as service:
        with socket.create_connection(("127.0.0.1", port_of(service))) as leaving:
            body = json.dumps(request)
            leaving.sendall(
                f"POST /v1/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            assert leaving.recv(100).startswith(b"HTTP/1.1 200")

        decoded = [0]

        def is_free() -> bool:
            slot = slots(service)[0]
            decoded.append(slot["next_token"][0]["n_decoded"])
            return not slot["is_processing"]

        until(is_free)

        # Free on its own it would be after the last token.
        assert max(decoded) < LONG / 2
        assert BitNetClient("127.0.0.1", port_of(service)).generate("the", max_tokens=3)


def test_a_megabyte_of_prompt_is_refused_with_both_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(
        openai.BadRequestError, match=r"\(\d+ tokens\) exceeds the available context size \(256"
    ):
        client.completions.create(model="any", prompt="the quick brown fox " * 52_000, max_tokens=2)

    assert client.completions.create(model="any", prompt="the", max_tokens=2).usage is not None


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "said"),
    [
        ("POST", "/v1/completions", b'{"prompt": ', 400, "no JSON"),
        ("POST", "/v1/completions", b"\xff\xfe\x00", 400, "no JSON"),
        ("POST", "/v1/completions", b"[" * 1_000_000, 400, "no JSON"),
        ("POST", "/v1/completions", b"", 400, "no JSON"),
        ("POST", "/v1/completions", b"[]", 400, "JSON object"),
        ("POST", "/v1/completions", b"{}", 400, "'prompt' must be a text or a list"),
        ("POST", "/v1/completions", b'{"prompt": [99999]}', 400, "invalid tokens"),
        ("POST", "/v1/completions", b'{"prompt": "a", "max_tokens": "b"}', 400, "max_tokens"),
        ("POST", "/v1/chat/completions", b'{"messages": "a"}', 400, "'messages' must be a list"),
        ("POST", "/v1/chat/completions", b'{"messages": []}', 400, "'messages' must hold objects"),
        ("POST", "/v1/chat/completions", b'{"messages": [{"content": "a"}]}', 400, "'role'"),
        ("POST", "/detokenize", b'{"tokens": [-1]}', 400, "token ids"),
        # Each of these ends the engine, or takes all memory, where it is let through.
        (
            "POST",
            "/v1/completions",
            b'{"prompt": "a", "grammar": "root ::= (("}',
            400,
            "'grammar' is not accepted",
        ),
        ("POST", "/v1/completions", b'{"prompt": "a", "repeat_last_n": 2147483647}', 400, "at most 65536"),
        ("GET", "/v1/completions", b"", 405, "takes POST, not GET"),
        ("DELETE", "/health", b"", 405, "takes GET, not DELETE"),
        ("GET", "/", b"", 404, "there is no / here; there is /health"),
        ("GET", "/slots", b"", 404, "there is no /slots"),
        ("POST", "/lora-adapters", b"[]", 404, "there is no /lora-adapters"),
        ("PROPFIND", "/health", b"", 501, "PROPFIND"),
        ("POST", "/v1/completions", b"x" * (LARGEST_BODY + 1), 413, "16777217 bytes"),
    ],
)
def test_what_is_no_request_is_told_why_as_json(
    service: Service, method: str, path: str, body: bytes, status: int, said: str
) -> None:
    found, answer = ask(service, method, path, body)

    assert (found, answer["error"]["code"]) == (status, status)
    assert said in answer["error"]["message"]
    assert ask(service, "GET", "/health") == (200, {"status": "ok"})


def test_no_http_at_all_is_answered_too(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", port_of(service))) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")

        assert b'"code": 400' in connection.makefile("rb").read()


def test_a_web_page_may_not_use_a_server_of_this_machine(service: Service) -> None:
    body = b'{"prompt": "a", "max_tokens": 1}'

    for headers in ({"Origin": "https://example.com"}, {"Host": "example.com"}):
        assert ask(service, "POST", "/v1/completions", body, **headers)[0] == 403
    for headers in ({"Origin": "http://localhost:3000"}, {"Host": "127.0.0.1"}):
        assert ask(service, "POST", "/v1/completions", body, **headers)[0] == 200


def test_an_engine_that_crashes_is_started_again(tiny_gguf: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Service(tiny_gguf, port=0, threads=1) as service:
        process = service._engine._process
        assert process is not None
        os.kill(process._child.pid, signal.SIGSEGV)
        until(lambda: service._engine._process is not process)
        answers = list[int]()

        def is_back() -> bool:
            answers.append(ask(service, "GET", "/health")[0])
            return answers[-1] == 200

        until(is_back)

    assert set(answers) <= {200, 502, 503}
    assert "tiny.gguf: the engine ended (found signal SIGSEGV); it is started again" in caplog.text


def test_a_taken_port_is_one_line(tiny_gguf: Path, service: Service) -> None:
    with pytest.raises(
        UserError, match=r"port \d+: cannot be listened on \(found 127.0.0.1: Address already"
    ) as error:
        Service(tiny_gguf, port=port_of(service)).start()

    assert error.value.exit_code == ExitCode.BUSY


def test_a_damaged_file_is_one_line_with_what_the_engine_found(tiny_gguf: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(tiny_gguf.read_bytes()[:100_000])

    with pytest.raises(UserError, match=r"damaged.gguf: .*is not within the file bounds") as error:
        Service(damaged, port=0).start()

    assert error.value.exit_code == ExitCode.BAD_DATA


@pytest.mark.parametrize(("content", "code"), [(None, ExitCode.BAD_INPUT), (b"GGML", ExitCode.BAD_DATA)])
def test_what_is_no_gguf_file_is_refused_at_once(
    content: bytes | None, code: ExitCode, tmp_path: Path
) -> None:
    path = tmp_path / "file.gguf"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(UserError, match="is no GGUF file") as error:
        Service(path)

    assert error.value.exit_code == code


def test_stopping_disconnects_whoever_waits(long_gguf: Path) -> None:
    service = Service(long_gguf, port=0, threads=1, context=LONG_CONTEXT)
    service.start()
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0)
    pieces = client.completions.create(
        model="any", prompt="a", max_tokens=LONG, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(pieces))

    service.stop()

    with pytest.raises(openai.APIConnectionError):
        list(pieces)
    assert not service.is_running()
