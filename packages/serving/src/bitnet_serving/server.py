"""`BitNetServer` and `BitNetInference`: a model served, or asked once, from Python.

With `bitnet_path=None` by llama.cpp from the package index; with the directory of a built microsoft/BitNet
by that, which is what runs I2_S, TL1 and TL2.
"""

import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from bitnet_serving.client import BitNetClient
from bitnet_serving.engine_server import EngineServer, check_gguf
from bitnet_serving.microsoft import inference_command, server_command
from bitnet_serving.server_process import ServerProcess
from bitnet_serving.service import Service
from durable import ExitCode, UserError

POLL_SECONDS = 0.1
ONE_SHOT_SECONDS = 3600


class BitNetServer:
    """A server on loopback, for as long as it is started; a context manager. `BitNetClient` talks with it."""

    def __init__(
        self, bitnet_path: Path | str | None, model_path: Path | str, port: int = 8080, num_threads: int = 4
    ) -> None:
        self.bitnet_path = None if bitnet_path is None else Path(bitnet_path)
        self.model_path = Path(model_path).absolute()  # Microsoft's programs run in a directory of their own
        self.port, self.num_threads = port, num_threads
        self._running: Service | ServerProcess | None = None

    def start(self, wait_for_ready: bool = True, timeout: float = 60) -> None:
        """UserError when a program or file is missing, the port is taken, or it is not ready in time."""
        if self.is_running():
            return
        if self.bitnet_path is None:
            # Listens and is ready, or neither: there is nothing to wait for later.
            service = Service(self.model_path, port=self.port, threads=self.num_threads)
            service.start(timeout=timeout)
            self._running = service
            return
        command = server_command(
            self.bitnet_path, self.model_path, host="127.0.0.1", port=self.port, threads=self.num_threads
        )
        check_gguf(self.model_path)
        self._running = ServerProcess(command, cwd=self.bitnet_path)
        if wait_for_ready:
            self._wait_until_ready(self._running, timeout)

    def stop(self) -> None:
        """End it, if it runs."""
        if self._running is not None:
            self._running.stop()
            self._running = None

    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._running is not None and self._running.is_running()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_ready(self, process: ServerProcess, timeout: float) -> None:
        client = BitNetClient("127.0.0.1", self.port, timeout=timeout)
        deadline = time.monotonic() + timeout
        while not client.health_check():
            if not process.is_running():
                found = process.why_it_ended()
            elif time.monotonic() > deadline:
                found = f"nothing after {timeout:g} s"
            else:
                time.sleep(POLL_SECONDS)
                continue
            self.stop()
            raise UserError(
                f"{self.model_path}: Microsoft's server is not ready",
                found,
                "try its run_inference_server.py by hand",
                ExitCode.BAD_DATA,
            )


class BitNetInference:
    """One prompt, one answer, with nothing left running."""

    def __init__(self, bitnet_path: Path | str | None, model_path: Path | str, num_threads: int = 4) -> None:
        self.bitnet_path = None if bitnet_path is None else Path(bitnet_path)
        self.model_path, self.num_threads = Path(model_path).absolute(), num_threads

    def generate(self, prompt: str, max_tokens: int = 128, temperature: float = 0.7) -> str:
        """What follows the prompt. Microsoft's program repeats the prompt in front of it; it is taken off."""
        if self.bitnet_path is None:
            with EngineServer(self.model_path, threads=self.num_threads, slots=1) as engine:
                return engine.client().generate(prompt, max_tokens, temperature)
        command = inference_command(
            self.bitnet_path,
            self.model_path,
            prompt,
            max_tokens=max_tokens,
            threads=self.num_threads,
            temperature=temperature,
        )
        check_gguf(self.model_path)
        ended = subprocess.run(
            command,
            cwd=self.bitnet_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ONE_SHOT_SECONDS,
            check=False,
        )
        if ended.returncode != 0:
            last = ended.stderr.strip().rpartition("\n")[2]
            raise UserError(
                f"{self.model_path}: Microsoft's program failed",
                f"exit code {ended.returncode}: {last}",
                "try its run_inference.py by hand",
                ExitCode.BAD_DATA,
            )
        return ended.stdout.lstrip().removeprefix(prompt)
