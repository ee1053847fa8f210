"""The engine behind `serve`, `chat` and `bench`: llama.cpp from the package index, in a child process.

It listens on a loopback port that the system chose and answers whoever knows its key.
"""

import os
import queue
import secrets
import sys
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from bitnet_serving.client import BitNetClient
from bitnet_serving.server_child import ADDRESS, EngineSettings
from bitnet_serving.server_process import ServerProcess
from durable import ExitCode, UserError

CHILD = Path(__file__).with_name("server_child.py")
START_SECONDS = 600.0
ANSWER_SECONDS = 3600.0
CONTEXT = 4096
SLOTS = 4
MAGIC = b"GGUF"


def processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class EngineServer:
    """llama.cpp's own HTTP server for one file; a context manager."""

    def __init__(
        self,
        gguf_path: Path,
        *,
        lora: Path | None = None,
        threads: int | None = None,
        context: int = CONTEXT,
        slots: int = SLOTS,
    ) -> None:
        for path in (gguf_path, *([lora] if lora else [])):
            check_gguf(path)
        self.gguf_path = gguf_path
        self.settings = EngineSettings(
            gguf_path=gguf_path.absolute(),
            api_key=secrets.token_hex(16),
            threads=threads or processors(),
            context=context,
            slots=slots,
            lora=lora and lora.absolute(),
        )
        self.host = "127.0.0.1"
        self.port = 0
        self._process: ServerProcess | None = None

    def start(self, *, timeout: float = START_SECONDS) -> None:
        """Load the file; UserError when the engine cannot."""
        # An address, or None when the child has nothing more to say.
        self.port = 0
        heard: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._process = ServerProcess(
            # -P: no module of this directory may stand in for one that the engine imports.
            [sys.executable, "-P", str(CHILD)],
            first_line=self.settings.to_json(),
            on_line=lambda line: heard.put(line.removeprefix(ADDRESS)) if line.startswith(ADDRESS) else None,
            on_end=lambda: heard.put(None),
        )
        try:
            address = heard.get(timeout=timeout)
        except queue.Empty:
            self.stop()
            raise self._failure("is not ready", f"nothing after {timeout:g} s") from None
        if address is None:
            raise self.crash()
        self.port = urlsplit(address).port or 0

    def is_running(self) -> bool:
        """Whether it was started and lives."""
        return self._process is not None and self._process.is_running()

    def wait(self) -> None:
        """Until it ends."""
        assert self._process is not None
        self._process.wait()

    def crash(self) -> UserError:
        """What to say when it is no longer running."""
        assert self._process is not None
        return self._failure("the engine ended", self._process.why_it_ended())

    def client(self, *, timeout: float = ANSWER_SECONDS) -> BitNetClient:
        """Who may ask it."""
        return BitNetClient(self.host, self.port, timeout, api_key=self.settings.api_key)

    def stop(self) -> None:
        """End it, whatever it is doing."""
        if self._process is not None:
            self._process.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _failure(self, what: str, found: str) -> UserError:
        return UserError(
            f"{self.gguf_path}: {what}",
            found,
            "check the file; one that llama.cpp loads is served",
            ExitCode.BAD_DATA,
        )


def check_gguf(path: Path) -> None:
    """Refuse what is not there or is something else, before an engine is started for it."""
    if not path.is_file():
        found = "a directory" if path.is_dir() else "nothing there"
        raise UserError(f"{path}: is no GGUF file", found, "name a .gguf file")
    try:
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise UserError(f"{path}: cannot be read", error.strerror, "check its permissions") from None
    if magic != MAGIC:
        raise UserError(
            f"{path}: is no GGUF file", f"it begins with {magic!r}", "name a .gguf file", ExitCode.BAD_DATA
        )
