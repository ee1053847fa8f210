"""Every token of a `tokenizer.json` by its id: its text and what engines know of it."""

from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

from durable import ExitCode, UserError

PREFIX = "tokenizer.ggml."
SPACE = "▁"
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))


class TokenType(IntEnum):
    """What engines know of a token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Tokens:
    """Every token of the file by its id."""

    def __init__(
        self, path: Path, pipeline: Mapping[str, Any], *, vocab_size: int, without: int | None
    ) -> None:
        self.size = vocab_size
        vocab = pipeline["model"].get("vocab")
        if not isinstance(vocab, dict):
            raise UserError(
                f"{path}: no vocabulary with ids",
                found=type(vocab).__name__,
                fix="use a BPE tokenizer",
                exit_code=ExitCode.BAD_DATA,
            )
        self.added = {int(each["id"]): each for each in pipeline.get("added_tokens", ())}
        self.texts: dict[int, str] = {int(number): text for text, number in vocab.items()} | {
            number: each["content"] for number, each in self.added.items()
        }
        if without is not None:
            self.texts.pop(without, None)
            self.added.pop(without, None)
        self.unknown = pipeline["model"].get("unk_token")
        self.ids = {text: number for number, text in self.texts.items()}
        if max(self.texts, default=0) >= vocab_size:
            raise UserError(
                f"{path}: more tokens than the model has rows",
                found=f"token {max(self.texts)}, {vocab_size} rows",
                fix="save the model with the tokenizer that it was trained with",
                exit_code=ExitCode.BAD_DATA,
            )

    def listed(self, *, escapes_space: bool) -> tuple[list[str], list[int]]:
        """Text and type of each row of the embedding; rows without a token have a name that nobody types."""
        texts = [self._text(number, escapes_space) for number in range(self.size)]
        return texts, [int(self._type(number, escapes_space)) for number in range(self.size)]

    def _text(self, number: int, escapes_space: bool) -> str:
        text = self.texts.get(number)
        if text is None:
            return f"[PAD{number}]"
        added = self.added.get(number)
        # Those are looked for in the text after it was normalised, the engine's before.
        return text.replace(SPACE, " ") if escapes_space and added and added["normalized"] else text

    def _type(self, number: int, has_bytes: bool) -> TokenType:
        added, text = self.added.get(number), self.texts.get(number)
        if text is None:
            return TokenType.UNUSED
        if has_bytes and text in BYTE_TOKENS:
            return TokenType.BYTE
        if text == self.unknown:
            return TokenType.UNKNOWN
        if added is None:
            return TokenType.NORMAL
        return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
