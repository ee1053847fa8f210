"""The engine that GGUF files are proved with: llama.cpp (xllamacpp), in a child process.

A file that is malformed, or right and too much for the machine, can end an engine in any way: an error, an
abort of its C code, silence. So it runs in a process of its own with a time limit for every answer, and each
of these ends is one `UserError` about the file. What the engine prints goes to a log, never to the terminal.

    with Engine(path) as engine:
        for top in engine.next_log_probs(ids, positions=range(len(ids)), top_k=256):
            ...

Positions: position p of `ids` predicts the token after `ids[p]`.
"""

import contextlib
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from durable import ExitCode, UserError

CHILD = Path(__file__).with_name("engine_child.py")
LOG_TAIL_BYTES = 20_000
ENDING_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class TopLogProbs:
    """The most likely next tokens, most likely first, out of the whole vocabulary."""

    ids: list[int]
    log_probs: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Speed of one prompt and of the tokens generated after it."""

    num_prompt_tokens: int
    prompt_tokens_per_second: float
    num_decoded_tokens: int
    decoded_tokens_per_second: float


class Engine:
    """A GGUF file, loaded. A context manager: the process ends with it."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        lora: str | os.PathLike[str] | None = None,
        threads: int = 1,
        context: int = 512,
        precise: bool = True,
        start_seconds: float = 300.0,
        answer_seconds: float = 300.0,
    ) -> None:
        """`precise` keeps keys and values in fp32 and attention plain, to compare; without it the engine
        computes as it does for its users. The context is at most the model's own.
        """
        self.path = Path(path)
        for needed in (self.path, self.path if lora is None else Path(lora)):
            if not needed.is_file():
                raise UserError(f"{needed}: no such file", fix="name a GGUF file")
        self._answer_seconds = answer_seconds
        settings = {
            "path": str(self.path.absolute()),
            "lora": None if lora is None else str(Path(lora).absolute()),
            "threads": threads,
            "context": context,
            "precise": precise,
        }
        self._unread = b""
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the child runs)
        self._child = subprocess.Popen(
            # -P: no module of this directory may stand in for one that the engine imports.
            [sys.executable, "-P", str(CHILD), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            # An interrupt at the terminal is for us; we end the child.
            start_new_session=True,
        )
        try:
            self._answer(start_seconds)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            # A request that was cut off cannot be flushed into a pipe that nobody reads.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._log.close()

    @property
    def process_id(self) -> int:
        """Of the child."""
        return self._child.pid

    def tokenize(self, texts: Iterable[str], *, add_special: bool = False) -> list[list[int]]:
        """Token ids of each text; special tokens in it are recognised, as transformers does."""
        return [
            self._ask({"ask": "tokenize", "text": text, "add_special": add_special})["tokens"]
            for text in texts
        ]

    def next_log_probs(self, ids: Sequence[int], positions: Iterable[int], top_k: int) -> list[TopLogProbs]:
        """What the engine expects after `ids[: position + 1]`, for each position, one call each.

        Ascending positions find their prefix cached. An answer without log-probabilities is an error.
        """
        positions = list(positions)
        self._send({"ask": "next_log_probs", "ids": list(ids), "positions": positions, "top_k": top_k})
        top = [TopLogProbs(**self._answer(self._answer_seconds)) for _ in positions]
        for position, at_position in zip(positions, top, strict=True):
            if not at_position.ids:
                raise self._error("gave no probabilities", f"nothing at position {position}")
        return top

    def generate(self, ids: Sequence[int], num_tokens: int) -> list[int]:
        """Greedy continuation, up to an end-of-text token."""
        tokens: list[int] = self._complete(ids, num_tokens, ignore_eos=False)["tokens"]
        return tokens

    def timings(self, ids: Sequence[int], num_tokens: int) -> Timings:
        """Measure one prompt and `num_tokens` tokens after it, nothing of it cached."""
        measured = self._complete(ids, num_tokens, ignore_eos=True)["timings"]
        return Timings(
            num_prompt_tokens=measured["prompt_n"],
            prompt_tokens_per_second=measured["prompt_per_second"],
            num_decoded_tokens=measured["predicted_n"],
            decoded_tokens_per_second=measured["predicted_per_second"],
        )

    def _complete(self, ids: Sequence[int], num_tokens: int, *, ignore_eos: bool) -> dict[str, Any]:
        request = {"ask": "complete", "prompt": list(ids), "num_tokens": num_tokens, "ignore_eos": ignore_eos}
        return self._ask(request)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._send(request)
        return self._answer(self._answer_seconds)

    def _send(self, request: dict[str, Any]) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._child.stdout is not None
        deadline = time.monotonic() + seconds
        pipe = self._child.stdout.fileno()
        while b"\n" not in self._unread:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self._child.kill()
                raise self._error("gave no answer in time", f"silence for {seconds:g} s")
            piece = os.read(pipe, 1 << 16)
            if not piece:
                raise self._ended()
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> UserError:
        """stdout is closed: the process is ending, and its log says why, if anything does."""
        try:
            code = self._child.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            code = self._child.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return self._error("cannot run this file", self._last_reason() or how)

    def _last_reason(self) -> str:
        """The line of the log that says most."""
        size = os.fstat(self._log.fileno()).st_size
        tail = os.pread(self._log.fileno(), LOG_TAIL_BYTES, max(0, size - LOG_TAIL_BYTES))
        lines = [line.strip() for line in tail.decode(errors="replace").splitlines() if line.strip()]
        for pattern in (
            r"error loading model: (.+)",
            r"GGML_(?:ASSERT|ABORT).*",
            r"^error: (.+)",
            r" E (.+)",
        ):
            for line in lines:
                if found := re.search(pattern, line):
                    return found[found.re.groups]
        return lines[-1] if lines else ""

    def _error(self, what: str, found: str) -> UserError:
        return UserError(
            f"{self.path}: the engine {what}",
            found=found,
            fix="check the file's bytes with `wrinklefree verify`, or export it again",
            exit_code=ExitCode.BAD_DATA,
        )
