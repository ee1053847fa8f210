"""An engine behind a front, kept alive: what crashes it costs the requests of that moment, not the server."""

import logging
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bitnet_serving.engine_server import CONTEXT, SLOTS, START_SECONDS, EngineServer
from bitnet_serving.front import Front, Upstream
from durable import UserError

logger = logging.getLogger(__name__)


def serve(gguf_path: Path, **options: Any) -> None:
    """Serve a file until a signal ends it; `options` are those of `Service`."""
    with Service(gguf_path, **options) as service:
        if service.is_open:
            print(
                "warning: other machines can reach this server, and it asks nobody for a key", file=sys.stderr
            )
        print(f"{gguf_path.name} is served at {service.url}/v1; Ctrl-C ends it", flush=True)
        service.wait()


class Service:
    """An OpenAI-compatible server for one GGUF file; a context manager."""

    def __init__(
        self,
        gguf_path: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 8080,
        threads: int | None = None,
        context: int = CONTEXT,
        slots: int = SLOTS,
        lora: Path | None = None,
    ) -> None:
        self._engine = EngineServer(gguf_path, lora=lora, threads=threads, context=context, slots=slots)
        self._host, self._port = host, port
        self._front: Front | None = None
        self._is_stopping = threading.Event()
        self._is_over = threading.Event()
        self._failure: UserError | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        assert self._front is not None, "it was started"
        return self._front.url

    @property
    def is_open(self) -> bool:
        """Whether other machines can reach it."""
        return self._front is not None and self._front.is_open

    def start(self, *, timeout: float = START_SECONDS) -> None:
        """Listen and load; UserError when the port is taken or the file is not to be loaded."""
        self._is_stopping.clear()
        self._is_over.clear()
        self._front = Front(self._host, self._port, self._upstream)
        try:
            self._engine.start(timeout=timeout)
        except BaseException:
            self._front.server_close()
            self._engine.stop()
            raise
        threading.Thread(target=self._front.serve_forever, args=(0.1,), daemon=True).start()
        threading.Thread(target=self._keep_alive, daemon=True).start()

    def wait(self) -> None:
        """Until it is stopped; UserError when the engine is gone and does not come back."""
        self._is_over.wait()
        if self._failure is not None:
            raise self._failure

    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._front is not None and not self._is_over.is_set()

    def stop(self) -> None:
        """End it; whoever waits for an answer is disconnected."""
        self._is_stopping.set()
        self._is_over.set()
        self._engine.stop()
        if self._front is not None:
            self._front.shutdown()
            self._front.server_close()
            self._front = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _upstream(self) -> Upstream | None:
        return Upstream(self._engine.port, self._engine.settings.api_key) if self._engine.port else None

    def _keep_alive(self) -> None:
        while True:
            self._engine.wait()
            if self._is_stopping.is_set():
                return
            logger.warning("%s; it is started again", self._engine.crash().problem)
            try:
                self._engine.start()
            except UserError as failure:
                self._failure = failure
                self._is_over.set()
                return
            if self._is_stopping.is_set():
                self._engine.stop()
