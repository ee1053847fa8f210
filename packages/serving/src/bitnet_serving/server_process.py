"""A server in a child process: how it starts, how it ends, and one line about why it died.

A crash, an abort or a hang of an engine written in C++ is then an error of ours and not the end of whoever
asked. What the child says goes through a pipe that is always read, so it never blocks on it; the last lines
are kept.
"""

import contextlib
import re
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

KEPT_LINES = 40
STOP_SECONDS = 1.0
# "0.00.021.612 E srv    load_model: failed": time, level, part of the program.
LOG_PREFIX = re.compile(r"^[\d.]+ [A-Z] +(\w+ +)?")
TELLING = re.compile(r"error|fail|couldn't|cannot|assert|what\(\)|corrupt|invalid|out of", re.IGNORECASE)


class ServerProcess:
    """A running child. A thread calls `on_line` with every line that it says, then `on_end`."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        first_line: str = "",
        cwd: Path | None = None,
        on_line: Callable[[str], None] = lambda line: None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._on_line, self._on_end = on_line, on_end
        # In a session of its own: Ctrl-C in a terminal is for the parent, which ends the child.
        self._child = subprocess.Popen(
            command,
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._child.stdout,), daemon=True)
        self._reader.start()
        if first_line:
            with contextlib.suppress(BrokenPipeError):
                self._child.stdin.write(f"{first_line}\n")
                self._child.stdin.flush()

    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._child.poll() is None

    def wait(self) -> None:
        """Until it ends."""
        self._child.wait()

    def stop(self) -> None:
        """End it: asked once, made to a second later."""
        self._child.terminate()
        try:
            self._child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        self._reader.join(STOP_SECONDS)

    def why_it_ended(self) -> str:
        """How it ended, and the first of its last words that tell of an error."""
        code = self._child.wait()
        self._reader.join(STOP_SECONDS)
        ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        said = next((line for line in self._lines if TELLING.search(line)), "")
        return f"{ended}: {LOG_PREFIX.sub('', said)}" if said else ended

    def _read(self, output: IO[str]) -> None:
        for line in output:
            if line.strip():
                self._lines.append(line.strip())
                self._on_line(line.strip())
        self._on_end()
