"""`BitNetServer`, `BitNetClient`, `BitNetInference`: over our engine, and over stand-ins for Microsoft's."""

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bitnet_serving.client import BitNetClient, RefusedError
from bitnet_serving.gguf_reader import read_gguf
from bitnet_serving.server import BitNetInference, BitNetServer
from durable import ExitCode, UserError

# Listens as llama-server does, says more than a pipe holds, and keeps what it was called with.
LLAMA_SERVER = """
import http.server, json, pathlib, sys
arguments = sys.argv[1:]
pathlib.Path("arguments.json").write_text(json.dumps(arguments))
print("loading " * 200_000, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        print("asked " * 200_000, file=sys.stderr, flush=True)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")
port = int(arguments[arguments.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
LLAMA_CLI = """
import sys
arguments = sys.argv[1:]
print(arguments[arguments.index("-p") + 1] + " jumps", end="")
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def build(bitnet_path: Path, name: str, program: str) -> Path:
    """Something that can be run where Microsoft's build puts its programs."""
    path = bitnet_path / "build/bin" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{program}")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def server(tiny_gguf: Path) -> Iterator[BitNetServer]:
    with BitNetServer(None, tiny_gguf, port=free_port(), num_threads=1) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: BitNetServer) -> BitNetClient:
    return BitNetClient(port=server.port)


def test_a_started_server_is_healthy_until_it_is_stopped(tiny_gguf: Path) -> None:
    server = BitNetServer(None, tiny_gguf, free_port(), 1)
    client = BitNetClient("127.0.0.1", server.port)
    states = [(server.is_running(), client.health_check())]

    for change in (server.start, server.start, server.stop, server.stop):
        change()
        states.append((server.is_running(), client.health_check()))

    off, on = (False, False), (True, True)
    assert states == [off, on, on, off, off]


def test_a_stream_is_the_answer_in_pieces(client: BitNetClient) -> None:
    whole = client.generate("the fox", max_tokens=12, temperature=0)
    pieces = list(client.generate("the fox", max_tokens=12, temperature=0, stream=True))
    stopped = client.generate("the fox", max_tokens=12, temperature=0, stop=[whole[4]])

    assert whole == "".join(pieces)
    assert len(pieces) > 3
    assert stopped == whole[: whole.index(whole[4])]


def test_chat_is_the_template_and_generate(client: BitNetClient) -> None:
    messages = [{"role": "user", "content": "the fox"}]
    said = client.chat(messages, max_tokens=9, temperature=0)

    assert said == "".join(client.chat(messages, max_tokens=9, temperature=0, stream=True))
    assert said == client.generate("user: the fox\nassistant:", max_tokens=9, temperature=0)


def test_tokens_are_those_of_the_tokenizer_in_the_file(client: BitNetClient, tiny_gguf: Path) -> None:
    metadata = read_gguf(tiny_gguf).metadata
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    assert isinstance(tokens, list)
    assert isinstance(merges, list)
    vocabulary = {str(token): number for number, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (str(merge).split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = "the lazy dog, over 9 foxes"

    ids = client.tokenize(text)

    assert ids == tokenizer.encode(text).ids
    assert client.detokenize(ids) == text


def test_what_the_server_refuses_comes_with_its_words(client: BitNetClient) -> None:
    with pytest.raises(RefusedError, match=r"HTTP status 400: request \(\d+ tokens\) exceeds") as error:
        client.generate("the " * 1000)

    assert (error.value.kind, error.value.exit_code) == ("exceed_context_size_error", ExitCode.BAD_DATA)


def test_no_server_is_one_line() -> None:
    with pytest.raises(UserError, match=r"ConnectionRefusedError.*start it with 'wrinklefree serve FILE'"):
        BitNetClient(port=free_port(), timeout=5).generate("a")


def test_one_question_leaves_nothing_running(tiny_gguf: Path, client: BitNetClient) -> None:
    answer = BitNetInference(None, tiny_gguf, num_threads=1).generate("the fox", 6, temperature=0)

    assert answer == client.generate("the fox", 6, temperature=0)


def test_microsofts_server_gets_the_command_line_of_its_script(tiny_gguf: Path, tmp_path: Path) -> None:
    build(tmp_path, "llama-server", LLAMA_SERVER)
    port = free_port()

    with BitNetServer(tmp_path, tiny_gguf, port=port, num_threads=3) as server:
        # More than pipes hold has been said by then, and it still answers.
        assert all(BitNetClient("127.0.0.1", port).health_check() for _ in range(3))
        assert server.is_running()

    # run_inference_server.py at 16da220, with its defaults
    assert json.loads((tmp_path / "arguments.json").read_text()) == [
        *("-m", str(tiny_gguf), "-c", "2048", "-t", "3", "-n", "4096", "-ngl", "0", "--temp", "0.8"),
        *("--host", "127.0.0.1", "--port", str(port), "-cb"),
    ]
    assert not server.is_running()


def test_microsofts_answer_comes_without_the_prompt(tiny_gguf: Path, tmp_path: Path) -> None:
    build(tmp_path, "llama-cli", LLAMA_CLI)

    assert BitNetInference(tmp_path, tiny_gguf).generate("the fox") == " jumps"


def test_a_program_of_microsofts_that_fails_says_why(tiny_gguf: Path, tmp_path: Path) -> None:
    program = "import sys; sys.exit('error: unknown model architecture')"
    build(tmp_path, "llama-server", program)
    build(tmp_path, "llama-cli", program)

    for fails in (
        lambda: BitNetServer(tmp_path, tiny_gguf, port=free_port()).start(),
        lambda: BitNetInference(tmp_path, tiny_gguf).generate("a"),
    ):
        with pytest.raises(UserError, match="exit code 1: error: unknown model architecture") as error:
            fails()
        assert error.value.exit_code == ExitCode.BAD_DATA


def test_what_is_not_built_or_not_there_is_one_line(tiny_gguf: Path, tmp_path: Path) -> None:
    for fails in (
        lambda: BitNetServer(tmp_path, tiny_gguf).start(),
        lambda: BitNetInference(tmp_path, tiny_gguf).generate("a"),
    ):
        with pytest.raises(UserError, match=r"bitnet_path: llama-.* is not built there.*extern/README\.md"):
            fails()
    with pytest.raises(UserError, match=r"none\.gguf: is no GGUF file"):
        BitNetServer(None, tmp_path / "none.gguf").start()
