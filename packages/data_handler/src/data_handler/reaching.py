"""Addresses that may not answer: three tries within a minute, then one line that names the address.

Nothing here ever tries another address. Each try runs in a thread of its own, since no library offers a
limit that covers name look-up, connecting and a server that sends one byte a minute.
"""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from durable import ExitCode, UserError

NUM_TRIES = 3
TIMEOUT_SECONDS = 45.0
"""Leaves some for importing what asks, so that all of it stays below a minute."""
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError, TypeError, ImportError)

T = TypeVar("T")


def reach(
    address: str,
    action: Callable[[], T],
    *,
    timeout_seconds: float | None = None,
    pause_seconds: float = 1.0,
    num_tries: int = NUM_TRIES,
) -> T:
    """What `action` returns; UserError (exit code 4) when it failed three times or the time is over."""
    seconds = TIMEOUT_SECONDS if timeout_seconds is None else timeout_seconds
    deadline, failure = time.monotonic() + seconds, f"no answer for {seconds:.0f} seconds"
    for attempt in range(num_tries):
        outcome = _in_thread(action, deadline - time.monotonic())
        if outcome is None:
            break
        if "value" in outcome:
            return outcome["value"]  # type: ignore[return-value]
        error = outcome["error"]
        if isinstance(error, UserError):
            raise error
        assert isinstance(error, BaseException)
        failure = f"{type(error).__name__}: {error}"
        if isinstance(error, _FINAL) or time.monotonic() + pause_seconds > deadline:
            break
        if attempt + 1 < num_tries:
            time.sleep(pause_seconds)
            pause_seconds *= 2
    raise unreachable(address, failure)


def unreachable(address: str, failure: object) -> UserError:
    """The error for an address that does not give its data."""
    fix = "check the address, the network and your access to it; what was prepared so far is kept"
    return UserError(f"{address}: cannot be reached", failure, fix, ExitCode.BAD_DATA)


def _in_thread(action: Callable[[], T], seconds: float) -> dict[str, T | BaseException] | None:
    """{"value": …} or {"error": …}; None when `seconds` went by without either."""
    outcome: dict[str, T | BaseException] = {}

    def run() -> None:
        try:
            outcome["value"] = action()
        except BaseException as error:  # handed to the caller, whatever it is
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(seconds, 0.0))
    return dict(outcome) or None
