"""Text to token ids, through the tiktoken core where it gives the same ids.

A byte-level BPE without normaliser can run through the tiktoken core with the same merges: its ranks are the
merges in order, and a table maps each rank to the tokenizer's own id. Whether that gives the same ids is
checked on real documents before it is relied on; documents that hold one of the tokenizer's added tokens, or
are very long, go through the tokenizer itself.
"""

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_handler.demo import TOKENIZER_DIR
from data_handler.reaching import reach
from durable import ExitCode, UserError

logger = logging.getLogger(__name__)

NUM_CHECKED = 64
"""Documents on which the two ways are compared."""
LONGEST_FAST = 100_000
"""Characters: beyond, the regular expression of the fast path may give up."""
_LARGEST_TOKENIZER = 256 * 2**20
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
"""As `Digits(individual_digits=True)` before the GPT-2 expression, which never sees across a digit."""
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
        self._core = _fast_core(self._raw) if fast else None
        self._num_checked = 0

    @property
    def is_fast(self) -> bool:
        """Whether documents go through the tiktoken core."""
        return self._core is not None

    @property
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

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Token ids of each text, without special tokens around it."""
        if self._core is None:
            return self._encode_plainly(texts)
        check = texts[: max(0, NUM_CHECKED - self._num_checked)]
        if check and not self._agrees(check):
            self._core = None
            return self._encode_plainly(texts)
        encoded: list[Any] = [None] * len(texts)
        slow = []
        for index, text in enumerate(texts):
            if len(text) > LONGEST_FAST or (self._added is not None and self._added.search(text)):
                slow.append(index)
            else:
                encoded[index] = self._encode_fast(text)
        for index, ids in zip(slow, self._encode_plainly([texts[index] for index in slow]), strict=True):
            encoded[index] = ids
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

    def _encode_plainly(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def _encode_fast(self, text: str) -> NDArray[np.uint32]:
        assert self._core is not None
        core, ids_of_ranks = self._core
        ids: NDArray[np.uint32] = ids_of_ranks[core.encode_to_numpy(text, disallowed_special=())]
        return ids

    def _agrees(self, texts: Sequence[str]) -> bool:
        """The two ways give the same ids for `texts`."""
        usable = [
            text
            for text in texts
            if len(text) <= LONGEST_FAST and not (self._added and self._added.search(text))
        ]
        for text, ids in zip(usable, self._encode_plainly(usable), strict=True):
            if not np.array_equal(self._encode_fast(text), ids):
                logger.warning(
                    "%s: the fast path gives other ids; using the tokenizer itself", self.directory
                )
                return False
        self._num_checked += len(texts)
        return True

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


def _fast_core(raw: dict[str, Any]) -> tuple[Any, NDArray[np.uint32]] | None:
    """(tiktoken encoding, id of each rank) for a plain byte-level BPE; None for any other tokenizer."""
    model, pattern = raw.get("model") or {}, _split_pattern(raw.get("pre_tokenizer"))
    if pattern is None or raw.get("normalizer") is not None or not _is_plain_bpe(model):
        return None
    to_byte = {character: byte for byte, character in byte_characters().items()}
    vocab: dict[str, int] = model["vocab"]
    tokens = [byte_characters()[byte] for byte in range(256)]
    for merge in model["merges"]:
        tokens.append("".join(merge.split(" ") if isinstance(merge, str) else merge))
    tokens = list(dict.fromkeys(tokens))
    if any(token not in vocab for token in tokens) or any(c not in to_byte for c in set("".join(tokens))):
        return None
    import tiktoken

    ranks = {bytes(to_byte[character] for character in token): rank for rank, token in enumerate(tokens)}
    core = tiktoken.Encoding("same-merges", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return core, np.array([vocab[token] for token in tokens], dtype=np.uint32)


def _is_plain_bpe(model: dict[str, Any]) -> bool:
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "fuse_unk")
    return model.get("type") == "BPE" and bool(model.get("merges")) and not any(model.get(key) for key in odd)


def _split_pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The regular expression of a pre-tokenizer that ends in byte level; None when it is something else."""
    if pre_tokenizer is None:
        return None
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *before, last = steps
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    match before, last.get("use_regex", True):
        case [], True:
            return _GPT2
        case [{"type": "Digits", "individual_digits": True}], True:
            return _GPT2_DIGITS
        case [
            {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}
        ], False:
            return pattern
        case _:
            return None


def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary, as GPT-2 chose them."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _bad(path: Path, what: str, found: object = None) -> UserError:
    return UserError(f"{path}: {what}", found, "give a directory with a tokenizer.json", ExitCode.BAD_DATA)
