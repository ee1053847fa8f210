"""The one error whose text a user sees, and the exit codes that go with it.

    error: <key or file>: <what is wrong> (found <X>); fix: <what to do>

One line whatever went in: newlines become spaces, control characters are spelled out, long values lose
their middle, secrets become `***`. All of that happens when the error is made, so no logger can undo it.
"""

import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from enum import IntEnum

from durable.masking import MASK, is_secret_name, mask_secrets


class ExitCode(IntEnum):
    """How a process ends when a user can do something about it; 1 is a fault of ours."""

    BAD_INPUT = 2
    BUSY = 3
    """The directory belongs to another process."""
    BAD_DATA = 4
    """A checkpoint or data file is damaged, foreign or missing."""
    CANNOT_WRITE = 5
    DIVERGED = 6
    DISTRIBUTED = 7


class UserError(Exception):
    """Something a person can put right: what is wrong, what was found, what to do, and the exit code.

    Give `what` as `<key or file>: <what is wrong>`. With `choices`, the text lists them, closest to `found`
    first, and asks "did you mean" when one is close.
    """

    def __init__(
        self,
        what: str,
        found: object = None,
        fix: str | None = None,
        exit_code: int = ExitCode.BAD_INPUT,
        choices: Iterable[object] | None = None,
    ) -> None:
        assert exit_code != 0, "an error is never a success"
        self.what = _one_line(_mask_what(_cut(what)), longest=800)
        self.found = None if found is None else _one_line(_mask_found(what, _cut(str(found))), longest=200)
        self.fix = None if fix is None else _one_line(mask_secrets(_cut(fix)), longest=500)
        self.exit_code = int(exit_code)
        names = [_one_line(mask_secrets(_cut(str(choice))), longest=80) for choice in choices or ()]
        self.choices = tuple(names if self.found is None else closest_first(self.found, names))
        super().__init__(self.what, self.found, self.fix, self.exit_code, self.choices)

    @property
    def problem(self) -> str:
        """What is wrong and what was found, without the advice."""
        return self.what if self.found is None else f"{self.what} (found {self.found or repr('')})"

    def __str__(self) -> str:
        advice = [part for part in (self.fix, self._suggestion()) if part]
        return f"{self.problem}; fix: {'; '.join(advice)}" if advice else self.problem

    def _suggestion(self) -> str:
        if not self.choices:
            return ""
        listed = ", ".join(self.choices[:12])
        if len(self.choices) > 12:
            listed += f" and {len(self.choices) - 12} more"
        if self.found and self.found != self.choices[0] and _likeness(self.found, self.choices[0]) >= 0.6:
            return f"did you mean '{self.choices[0]}'? accepted: {listed}"
        return f"accepted: {listed}" if self.fix else f"use one of: {listed}"


def error_line(error: BaseException) -> str:
    """The line to print on stderr, for any exception; after a `UserError`, exit with its `exit_code`."""
    if isinstance(error, UserError):
        return f"error: {error}"
    text = _one_line(mask_secrets(_cut(str(error))), longest=800)
    return f"error: {type(error).__name__}: {text}" if text else f"error: {type(error).__name__}"


def closest_first(found: str, choices: Iterable[str]) -> list[str]:
    """`choices` from most to least like `found`; equals keep their order."""
    return sorted(choices, key=lambda choice: -_likeness(found, choice))


def _likeness(found: str, choice: str) -> float:
    """1 for the same text but for case; the right last part under a wrong path counts nearly as much."""
    found, choice = found.strip("'\"").casefold(), choice.casefold()
    whole = SequenceMatcher(None, found, choice).ratio()
    last = SequenceMatcher(None, found.rpartition(".")[2], choice.rpartition(".")[2]).ratio()
    return max(whole, 0.95 * last)


def _mask_what(what: str) -> str:
    """`wandb.api_key: rejected` opens with the key that it is about; the colon there assigns nothing."""
    subject, colon, sentence = what.partition(": ")
    return (
        f"{subject}{colon}{mask_secrets(sentence)}"
        if re.fullmatch(r"[\w.-]+", subject)
        else mask_secrets(what)
    )


def _mask_found(what: str, found: str) -> str:
    """What was found under a key whose name says secret is one, whatever it looks like."""
    subject = re.match(r"[\w.-]+", what)
    return MASK if subject and is_secret_name(subject[0]) else mask_secrets(found)


def _one_line(text: str, *, longest: int) -> str:
    """Printable, on one line, and with its middle cut out when it is too long to read."""
    text = " ".join(text.split())
    if not text.isprintable():
        text = "".join(
            char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
        )
    return _cut(text, longest)


def _cut(text: str, longest: int = 20_000) -> str:
    """The beginning and the end. Before masking, it only saves time: far more is kept than is shown."""
    if len(text) <= longest:
        return text
    head, tail = longest * 2 // 3, longest // 3
    return f"{text[:head]} … {len(text) - head - tail} characters … {text[-tail:]}"
