"""Text to token ids, by the fast path where it gives the same ids.

Whether it does is checked on real documents of every piece of a source before it is relied on, so that what
a piece becomes depends on nothing but the piece. Documents that hold one of the tokenizer's added tokens go
through the tokenizer itself. Very long documents are cut where a word begins for certain: the tokenizer
needs some hundred bytes of memory for each character that it sees at once.
"""

import copy
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_handler.demo import TOKENIZER_DIR
from data_handler.fast_path import cut_safely, fast_path, is_known
from data_handler.reaching import reach
from durable import ExitCode, UserError

logger = logging.getLogger(__name__)

NUM_CHECKED, CHARACTERS_CHECKED = 64, 2**17
"""Documents of each piece on which the two ways are compared; fewer when they are long."""
LONGEST_WHOLE = 2**18
"""Characters: a longer document is cut where that changes nothing."""
_LARGEST_TOKENIZER = 256 * 2**20
_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


class TextEncoder:
    """A tokenizer, its end-of-text token, and the fastest way through it that gives its ids."""

    def __init__(self, directory: Path, *, fast: bool = True) -> None:
        from tokenizers import Tokenizer

        self.directory = directory
        self._raw = _read_json(directory / "tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_str(json.dumps(self._raw))
        except Exception as error:  # what the library raises for a bad file is a bare Exception
            raise _bad(directory / "tokenizer.json", "is not a tokenizer", error) from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        settings = directory / "tokenizer_config.json"
        self._settings = _read_json(settings) if settings.is_file() else {}
        self.eos_token_id = self._find_eos()
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        added = [str(token["content"]) for token in self._raw.get("added_tokens") or []]
        self._added = re.compile("|".join(map(re.escape, added))) if added else None
        self._fast = self._untried = fast_path(self._raw) if fast else None
        self._is_known = is_known(self._raw)
        self._num_checked = self._characters_checked = 0

    @property
    def is_fast(self) -> bool:
        """Whether documents go through the tiktoken core."""
        return self._fast is not None

    @cached_property
    def fingerprint(self) -> str:
        """Equal for tokenizers that give equal ids, whatever the layout of their file."""
        canonical = json.dumps([self._raw, self.eos_token_id], sort_keys=True)
        return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def chat_template(self) -> str | None:
        """The Jinja template for chat messages."""
        beside = self.directory / "chat_template.jinja"
        if beside.is_file():
            return beside.read_text(encoding="utf-8")
        template = self._settings.get("chat_template")
        return template if isinstance(template, str) else None

    def afresh(self) -> "TextEncoder":
        """The same encoder before it has checked anything."""
        encoder = copy.copy(self)
        encoder._fast, encoder._num_checked, encoder._characters_checked = self._untried, 0, 0
        return encoder

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Token ids of each text, without special tokens around it."""
        if self._fast is not None and not self._agrees(texts):
            self._fast = None
        encoded: list[Any] = [None] * len(texts)
        together: dict[bool, list[int]] = {False: [], True: []}
        for index, text in enumerate(texts):
            if self._is_known and len(text) > LONGEST_WHOLE:
                stretches = cut_safely(text, LONGEST_WHOLE)
                ids = [self._encode_alike([part], self._goes_fast(part))[0] for part in stretches]
                encoded[index] = np.concatenate(ids)
            else:
                together[self._goes_fast(text)].append(index)
        for fast, places in together.items():
            if not places:
                continue
            found = self._encode_alike([texts[place] for place in places], fast)
            for place, ids_of_one in zip(places, found, strict=True):
                encoded[place] = ids_of_one
        return encoded

    def encode_with_spans(
        self, text: str, spans: Sequence[tuple[int, int]]
    ) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
        """Ids, and 1 for each token that begins inside one of the character `spans`."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
        wanted = np.zeros(len(starts), dtype=np.uint8)
        for first, last in spans:
            wanted |= ((starts >= first) & (starts < last)).astype(np.uint8)
        return np.array(encoding.ids, dtype=np.uint32), wanted

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def _encode_alike(self, texts: list[str], fast: bool) -> list[NDArray[np.uint32]]:
        if fast:
            assert self._fast is not None
            return self._fast.encode(texts)
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def _goes_fast(self, text: str) -> bool:
        return (
            self._fast is not None
            and self._fast.takes(text)
            and not (self._added is not None and self._added.search(text))
        )

    def _agrees(self, texts: Sequence[str]) -> bool:
        """The two ways give the same ids for those of `texts` that are still to be checked."""
        checked = []
        for text in texts:
            if self._num_checked == NUM_CHECKED or self._characters_checked > CHARACTERS_CHECKED:
                break
            self._num_checked += 1
            if len(text) <= LONGEST_WHOLE and self._goes_fast(text):
                self._characters_checked += len(text)
                checked.append(text)
        if not checked:
            return True
        ways = zip(self._encode_alike(checked, True), self._encode_alike(checked, False), strict=True)
        if all(np.array_equal(ours, theirs) for ours, theirs in ways):
            return True
        logger.warning("%s: the fast path gives other ids; using the tokenizer itself", self.directory)
        return False

    def _find_eos(self) -> int:
        named = self._settings.get("eos_token")
        named = named.get("content") if isinstance(named, dict) else named
        for name in (named,) if isinstance(named, str) else _END_NAMES:
            if (token_id := self.tokenizer.token_to_id(name)) is not None:
                return int(token_id)
        raise _bad(self.directory, "names no end-of-text token", named)


def load_encoder(name: str | Path = "demo", *, fast: bool = True) -> TextEncoder:
    """The encoder of a tokenizer: `demo`, a directory, a `tokenizer.json`, or a model's name on the hub."""
    if str(name) == "demo":
        return TextEncoder(TOKENIZER_DIR, fast=fast)
    path = Path(name)
    if path.is_file():
        path = path.parent
    if path.is_dir() or path.is_absolute():
        return TextEncoder(path, fast=fast)
    return TextEncoder(_download(str(name)), fast=fast)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    return Path(reach(name, lambda: snapshot_download(name, allow_patterns=patterns)))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_TOKENIZER:
            raise _bad(path, f"is larger than any tokenizer ({_LARGEST_TOKENIZER:,} bytes)")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _bad(path, "cannot be read", error.strerror) from None
    except (ValueError, RecursionError) as error:
        raise _bad(path, "is not JSON", error) from None
    if not isinstance(content, dict):
        raise _bad(path, "is not a JSON object", type(content).__name__)
    return content


def _bad(path: Path, what: str, found: object = None) -> UserError:
    return UserError(f"{path}: {what}", found, "give a directory with a tokenizer.json", ExitCode.BAD_DATA)
