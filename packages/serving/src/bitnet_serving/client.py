"""`BitNetClient`: a served model from Python, with nothing but the standard library.

It speaks to `wrinklefree serve` and to the server of Microsoft's BitNet alike: `/completion`, `/tokenize`,
`/detokenize`, `/v1/chat/completions`, `/health`.
"""

import contextlib
import http.client
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

from durable import ExitCode, UserError

Message = dict[str, str]
"""`role` and `content`."""
LARGEST_ERROR = 2**16


class RefusedError(UserError):
    """What a server says no to; `kind` is its word for it."""

    def __init__(self, server: str, found: str, kind: str = "") -> None:
        super().__init__(
            f"{server}: does not give what was asked for",
            found,
            "start it with 'wrinklefree serve FILE', or change the request",
            ExitCode.BAD_DATA,
        )
        self.kind = kind


class BitNetClient:
    """One server. What it refuses is a UserError with its own words."""

    def __init__(
        self, host: str = "localhost", port: int = 8080, timeout: float = 60, *, api_key: str | None = None
    ) -> None:
        self.host, self.port, self.timeout = host, port, timeout
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def health_check(self) -> bool:
        """Whether it answers and is ready."""
        try:
            with self._asked("/health"):
                return True
        except UserError:
            return False

    @overload
    def generate(
        self,
        prompt: str,
        max_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        top_k: int = ...,
        stop: Sequence[str] | None = ...,
        stream: Literal[False] = ...,
        **options: Any,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: str,
        max_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        top_k: int = ...,
        stop: Sequence[str] | None = ...,
        *,
        stream: Literal[True],
        **options: Any,
    ) -> Iterator[str]: ...

    def generate(
        self,
        prompt: str,
        max_tokens: int = 128,
        temperature: float = 0.7,
        top_p: float = 0.9,
        top_k: int = 40,
        stop: Sequence[str] | None = None,
        stream: bool = False,
        **options: Any,
    ) -> str | Iterator[str]:
        """What follows a prompt, or with `stream` the pieces of it as they come."""
        request = {
            "prompt": prompt,
            "n_predict": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "stop": list(stop or ()),
            **options,
        }
        if stream:
            return (event["content"] for event in self.events("/completion", request) if event["content"])
        return str(self.ask("/completion", request)["content"])

    @overload
    def chat(self, messages: Sequence[Message], *, stream: Literal[False] = ..., **options: Any) -> str: ...

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], **options: Any
    ) -> Iterator[str]: ...

    def chat(
        self, messages: Sequence[Message], *, stream: bool = False, **options: Any
    ) -> str | Iterator[str]:
        """The answer to a conversation; `options` are those of the OpenAI API, such as max_tokens."""
        request = {"messages": list(messages), **options}
        if stream:
            events = self.events("/v1/chat/completions", request)
            deltas = (choice["delta"] for event in events for choice in event["choices"])
            return (delta["content"] for delta in deltas if delta.get("content"))
        return str(self.ask("/v1/chat/completions", request)["choices"][0]["message"]["content"])

    def tokenize(self, text: str) -> list[int]:
        """The token ids of a text."""
        return [int(token) for token in self.ask("/tokenize", {"content": text})["tokens"]]

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self.ask("/detokenize", {"tokens": list(tokens)})["content"])

    def ask(self, path: str, request: object) -> Any:
        """What the server says to a request of any kind, as JSON."""
        with self._asked(path, request) as response:
            return self._parsed(response.read())

    def events(self, path: str, request: dict[str, Any]) -> Iterator[Any]:
        """Server-sent events until the last. Closing the iterator tells the server to stop."""
        with self._asked(path, {**request, "stream": True}) as response:
            for line in response:
                name, _, value = line.decode(errors="replace").strip().partition(": ")
                if name == "error":
                    raise self._failure(f"said {value}")
                if name == "data" and value != "[DONE]":
                    yield self._parsed(value)

    @contextlib.contextmanager
    def _asked(self, path: str, request: object | None = None) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)
        body = None if request is None else json.dumps(request).encode()
        try:
            connection.request("GET" if body is None else "POST", path, body, self._headers)
            response = connection.getresponse()
            if response.status != 200:
                message, kind = _said(response.read(LARGEST_ERROR))
                raise self._failure(f"HTTP status {response.status}: {message}", kind)
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise self._failure(f"{type(error).__name__}: {error}") from None
        finally:
            connection.close()

    def _parsed(self, text: str | bytes) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            raise self._failure("no JSON") from None

    def _failure(self, found: str, kind: str = "") -> UserError:
        return RefusedError(f"http://{self.host}:{self.port}", found, kind)


def _said(body: bytes) -> tuple[str, str]:
    """The sentence and the kind in an error of the API, else its text."""
    with contextlib.suppress(ValueError, LookupError, TypeError):
        error = json.loads(body)["error"]
        return str(error["message"]), str(error["type"])
    return body.decode(errors="replace"), ""
