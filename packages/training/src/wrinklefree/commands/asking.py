"""The side of a chat that asks: a line of the terminal, or of what is piped in."""

import sys

from durable import UserError

FORGOTTEN = "the oldest turn is forgotten: the conversation has become too long"


def next_question() -> str | None:
    """The next line with something in it; None when there is none."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401 - gives `input` its line editing
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            if is_terminal:
                print()
            return None
        if line == "/exit":
            return None
        if line:
            return line


def text_of_stdin() -> str:
    """What is piped in; UserError in a terminal."""
    if sys.stdin.isatty():
        raise UserError("generate: no prompt", fix="give --prompt TEXT, or pipe a text in")
    return sys.stdin.read().removesuffix("\n")
