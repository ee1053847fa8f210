"""Questions to an HTTP server that may be slow, wrong or gone: JSON to it, JSON back, three tries.

Connections are kept; as many questions as there are threads are under way at once.
"""

import http.client
import json
import queue
import select
import ssl
import time
from typing import Any
from urllib.parse import urlsplit

from data_handler.reaching import reach
from durable import ExitCode, UserError

SHARE_OF_A_TRY, SHARE_OF_A_PAUSE = 0.3, 0.015
"""Of the time for an answer: three tries, with a pause after the first, and twice that after the second."""
_READ_AT_ONCE = 2**20
_LARGEST_ERROR = 2**16
_TRY_AGAIN = (408, 425, 429)


class NoAnswerError(Exception):
    """Something that may be over in a moment."""


class JsonServer:
    """One address. `key` in messages says which setting it came from."""

    def __init__(self, address: str, *, timeout_seconds: float, secret: str | None, key: str) -> None:
        parts = urlsplit(address)
        assert parts.hostname is not None, "the configuration was checked"
        self.address = address.rstrip("/")
        self.timeout_seconds = timeout_seconds
        self.key = key
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path.rstrip("/")
        self._is_https = parts.scheme == "https"
        self._headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if secret is not None:
            self._headers["Authorization"] = f"Bearer {secret}"
        self._idle: queue.LifoQueue[http.client.HTTPConnection] = queue.LifoQueue()

    def ask(self, path: str, content: object | None = None, *, largest: int = 2**24) -> Any:
        """What the server says to a GET, or to a POST of `content`; UserError (exit code 4) if nothing.

        An answer of more than `largest` bytes is not read to its end.
        """
        body = None if content is None else json.dumps(content).encode()
        return reach(
            f"{self.key}: {self.address}{path}",
            lambda: self._tried(path, body, largest),
            timeout_seconds=self.timeout_seconds,
            pause_seconds=self.timeout_seconds * SHARE_OF_A_PAUSE,
        )

    def close(self) -> None:
        while not self._idle.empty():
            self._idle.get_nowait().close()

    def _tried(self, path: str, body: bytes | None, largest: int) -> Any:
        seconds = self.timeout_seconds * SHARE_OF_A_TRY
        connection = self._connection(seconds)
        try:
            connection.request("GET" if body is None else "POST", f"{self._path}{path}", body, self._headers)
            response = connection.getresponse()
            text = _read(response, largest if response.status == 200 else _LARGEST_ERROR, seconds)
        except TimeoutError:
            connection.close()
            raise NoAnswerError(f"nothing for {seconds:g} seconds") from None
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise NoAnswerError(f"{type(error).__name__}: {error}") from None
        except BaseException:
            connection.close()
            raise
        if response.will_close:
            connection.close()
        else:
            self._idle.put(connection)
        return self._parsed(path, response.status, text)

    def _parsed(self, path: str, status: int, text: bytes) -> Any:
        if status >= 500 or status in _TRY_AGAIN:
            raise NoAnswerError(f"HTTP status {status}: {_beginning(text)}")
        if status != 200:
            raise self.refused(path, f"HTTP status {status}: {_beginning(text)}")
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            # Cut off on its way, perhaps.
            raise NoAnswerError(f"no JSON: {error}") from None

    def refused(self, path: str, found: str, fix: str | None = None) -> UserError:
        """For an answer that another try would not change."""
        return UserError(
            f"{self.key}: {self.address}{path} does not give what was asked for",
            found,
            fix or "look at the server's log, its --max-logprobs, its --max-model-len and the key",
            ExitCode.BAD_DATA,
        )

    def _connection(self, seconds: float) -> http.client.HTTPConnection:
        try:
            connection = self._idle.get_nowait()
        except queue.Empty:
            if self._is_https:
                context = ssl.create_default_context()
                return http.client.HTTPSConnection(self._host, self._port, timeout=seconds, context=context)
            return http.client.HTTPConnection(self._host, self._port, timeout=seconds)
        if _is_closed(connection):
            connection.close()  # `request` connects anew
        return connection


def _is_closed(connection: http.client.HTTPConnection) -> bool:
    """Did the server end a connection that was kept? Then something can be read: its end."""
    if connection.sock is None:
        return False
    waiting = select.poll()
    waiting.register(connection.sock, select.POLLIN)
    return bool(waiting.poll(0))


def _read(response: http.client.HTTPResponse, largest: int, seconds: float) -> bytes:
    """The body, in time; a server that sends a byte now and then is as good as silent."""
    deadline, parts, size = time.monotonic() + seconds, [], 0
    while part := response.read1(_READ_AT_ONCE):
        parts.append(part)
        size += len(part)
        if size > largest:
            raise NoAnswerError(f"more than {largest:,} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    if response.length:
        raise NoAnswerError(f"the connection ended {response.length:,} bytes before the answer")
    response.close()  # reading to the end does not: the connection would not take the next question
    return b"".join(parts)


def _beginning(text: bytes) -> str:
    return text[:300].decode("utf-8", "replace")
