"""SIGTERM, SIGINT and SIGUSR1 ask for an orderly end: the step is finished, saved, and the process leaves.

A handler sets a flag; the loop reads it once per optimizer step, together on all ranks. A second SIGINT means
at once.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Which signal asked to stop; 0 is none."""

    def __init__(self) -> None:
        self.signal = 0

    def install(self) -> None:
        """Take the signals over, also from Lightning, which registers its own when it starts."""
        for number in WATCHED:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            os._exit(128 + signal.SIGINT)
        # 130 stays 130 when a scheduler sends SIGTERM after Ctrl-C.
        self.signal = self.signal or number

    @property
    def exit_code(self) -> int:
        """143 after SIGTERM or SIGUSR1, 130 after SIGINT, 0 when nobody asked."""
        if self.signal == 0:
            return 0
        return 128 + (signal.SIGINT if self.signal == signal.SIGINT else signal.SIGTERM)


@contextmanager
def watched_signals(flag: StopFlag) -> Iterator[None]:
    """Handle signals by `flag` inside the block; the handlers from before come back after it."""
    before = {number: signal.getsignal(number) for number in WATCHED}
    flag.install()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
