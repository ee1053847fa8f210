"""What clients talk to: checks a request, then passes it on to the engine, byte by byte.

    client ──► front: path, method, origin, size, JSON, fields ──► engine in its child process
                 └─ 4xx as JSON, 503 while there is no engine, 502 when it goes

The engine's own server takes any path from any web page, and some fields of its own end it (a deeply nested
grammar) or take all memory (a window of 2³¹ tokens). Here nothing of that reaches it. When a client leaves
mid-stream, its slot is freed; an answer that is not streamed the engine finishes for nobody
(ggml-org/llama.cpp#24496).
"""

import contextlib
import errno
import http.client
import json
import selectors
import socket
import socketserver
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from durable import ExitCode, UserError

PATHS = {
    "/health": "GET",
    "/v1/models": "GET",
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
    "/completion": "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
}
NEEDED = {
    "/v1/completions": ("prompt", (str, list)),
    "/v1/chat/completions": ("messages", (list,)),
    "/completion": ("prompt", (str, list)),
    "/tokenize": ("content", (str,)),
    "/detokenize": ("tokens", (list,)),
}
LARGEST_BODY = 16 * 2**20
IDLE_SECONDS = 60
REFUSED_FIELDS = ("grammar",)
WINDOWS = ("repeat_last_n", "dry_penalty_last_n")
LARGEST_WINDOW = 65_536


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where the engine is, and the key to it."""

    port: int
    api_key: str


class Front(socketserver.ThreadingTCPServer):
    """Listens from the moment it is made; `upstream()` says where the engine is, None while there is none."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, upstream: Callable[[], Upstream | None]) -> None:
        self.upstream = upstream
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except (OSError, OverflowError) as error:
            raise UserError(
                "host: cannot be found", f"{host}: {error}", "give an address of this machine"
            ) from None
        self.host, self.address_family, address = host, found[0], str(found[4][0])
        self.is_open = not is_loopback(address)
        try:
            super().__init__((address, port), _Handler)
        except OSError as error:
            is_taken = error.errno == errno.EADDRINUSE
            raise UserError(
                f"port {port}: cannot be listened on",
                f"{host}: {error.strerror}",
                f"choose another --{'port' if is_taken else 'host or --port'}; port 0 is any that is free",
                ExitCode.BUSY if is_taken else ExitCode.BAD_INPUT,
            ) from None
        self.port = int(self.server_address[1])

    @property
    def url(self) -> str:
        """What clients connect to."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no event."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _RequestError(Exception):
    """What a client can put right: a status of HTTP and a sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    server: Front

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET  # noqa: N815

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What `http.server` finds wrong with a request, as JSON."""
        self._send(code, message or http.client.responses.get(code, "error"))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: requests are private."""

    def _answer(self) -> None:
        try:
            body = self._body()
            path = self._path()
            self._check_origin()
            if self.command == "POST":
                _check_fields(path, body)
            upstream = self.server.upstream()
            if upstream is None:
                raise _RequestError(503, "the engine is starting; try again in a moment")
            self._pass_on(path, body, upstream)
        except _RequestError as error:
            self._send(error.status, str(error))

    def _path(self) -> str:
        path = urlsplit(self.path).path
        if path not in PATHS:
            raise _RequestError(404, f"there is no {path[:200]} here; there is {', '.join(PATHS)}")
        if self.command != PATHS[path]:
            raise _RequestError(405, f"{path} takes {PATHS[path]}, not {self.command}")
        return path

    def _body(self) -> bytes:
        if "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise _RequestError(411, "send a Content-Length; chunked bodies are not read")
        try:
            length = int(self.headers.get("Content-Length", "0"))
        except ValueError:
            length = -1
        if length < 0:
            self.close_connection = True
            raise _RequestError(400, "Content-Length: must be a whole number")
        if length > LARGEST_BODY:
            self.close_connection = True
            # A client that is still sending would not see an answer.
            self._discard(length)
            raise _RequestError(413, f"the body has {length} bytes; {LARGEST_BODY} are read")
        body = self.rfile.read(length)
        if len(body) < length:
            self.close_connection = True
            raise _RequestError(400, f"the body ended after {len(body)} of {length} bytes")
        return body

    def _discard(self, length: int) -> None:
        while length > 0 and (part := self.rfile.read(min(length, 2**16))):
            length -= len(part)

    def _check_origin(self) -> None:
        """A web page that somebody opens may not use a server that is meant for this machine alone."""
        origin = self.headers.get("Origin")
        asked = f"//{self.headers.get('Host', 'localhost')}"
        for name, address in (("Origin", origin or "//localhost"), ("Host", asked)):
            try:
                host = urlsplit(address).hostname or ""
            except ValueError:
                host = ""
            if not self.server.is_open and not is_loopback(host):
                raise _RequestError(403, f"{name} {address[:200]!r}: this server is for this machine alone")

    def _pass_on(self, path: str, body: bytes, upstream: Upstream) -> None:
        self.close_connection = True
        head = (
            f"{self.command} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            f"Authorization: Bearer {upstream.api_key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        address, has_begun = ("127.0.0.1", upstream.port), False
        with (
            contextlib.suppress(OSError),
            socket.create_connection(address, timeout=IDLE_SECONDS) as engine,
        ):
            engine.sendall(head.encode() + body)
            for part in self._parts(engine):
                self.connection.sendall(part)
                has_begun = True
        if not has_begun:
            raise _RequestError(502, "the engine ended before it answered; it is started again")

    def _parts(self, engine: socket.socket) -> Iterator[bytes]:
        """What the engine says, until it is done or the client has left."""
        with selectors.DefaultSelector() as selector:
            for end in (engine, self.connection):
                selector.register(end, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if engine in ready:
                    if not (part := engine.recv(2**16)):
                        return
                    yield part
                elif self.connection.recv(1, socket.MSG_PEEK):
                    # It has sent more, which nobody reads: the connection closes after this answer.
                    selector.unregister(self.connection)
                else:
                    raise ConnectionAbortedError

    def _send(self, status: int, message: str) -> None:
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"message": message, "type": kind, "param": None, "code": status}
        body = json.dumps({"error": error}).encode()
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)


def _check_fields(path: str, body: bytes) -> None:
    """Refuse what is no request to this path, and the few fields that would harm the engine."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _RequestError(400, f"the body is no JSON: {error}") from None
    if not isinstance(request, dict):
        raise _RequestError(400, "the body must be a JSON object")
    name, kinds = NEEDED[path]
    if not isinstance(request.get(name), kinds):
        wanted = " or ".join({str: "a text", list: "a list"}[kind] for kind in kinds)
        raise _RequestError(400, f"'{name}' must be {wanted}")
    if name == "messages" and not (request[name] and all(map(_is_message, request[name]))):
        raise _RequestError(400, "'messages' must hold objects, each with a 'role' and a 'content'")
    if name == "tokens" and not all(type(token) is int and token >= 0 for token in request[name]):
        raise _RequestError(400, "'tokens' must be a list of token ids")
    for field in REFUSED_FIELDS:
        if field in request:
            raise _RequestError(400, f"'{field}' is not accepted here; give a 'json_schema'")
    for field in WINDOWS:
        window = request.get(field, 0)
        if type(window) is not int or not -1 <= window <= LARGEST_WINDOW:
            raise _RequestError(400, f"'{field}' must be a whole number of at most {LARGEST_WINDOW}")


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str)
