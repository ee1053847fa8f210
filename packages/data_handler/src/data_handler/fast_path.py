r"""Byte-level BPE through the tiktoken core, several times as fast as the tokenizer itself and with its ids.

A byte-level BPE without normaliser is a regular expression that cuts the text into words, and merges inside
each. The tiktoken core does both with the same merges: its ranks are the merges in order, and a table maps
each rank to the tokenizer's own id.

What is slow there is one thing in the usual expressions: `\s+(?!\S)` leaves the last blank before a word to
that word, and for looking ahead the core has to use a backtracking engine. For the expressions known here, a
mark that no text contains is put where the blanks part, and documents are joined by another one, so that an
expression without looking ahead cuts the same words, from many documents at once:

    text     if x:\n········return y          end of document
    marked   if x:\n·······⓪·return y①        ⓪ and ① are the bytes 0 and 1

Texts that hold those two characters are left to the tokenizer, and so is every text for which an unknown
expression, looking ahead over a long run, might give up.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LONGEST_FAST = 100_000
"""Characters: beyond, an expression that looks ahead may give up."""
_BREAK, _END = "\0", "\1"
_LOOKING_AHEAD = r"|\s+(?!\S)|\s+"
_BEFORE_NUMBERS = r"|\s+(?=\p{N})"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
_GPT2_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+" + _BEFORE_NUMBERS
"""As `Digits(individual_digits=True)` before the GPT-2 expression, which never sees across a digit."""
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_LLAMA3 = _CONTRACTIONS + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
_QWEN2 = _CONTRACTIONS + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
_KNOWN = frozenset({_GPT2, _GPT2_DIGITS, _LLAMA3, _QWEN2})
"""Without their last two alternatives, which look ahead and are the same in all."""
_RARE_BLANKS = "\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_RARE_BLANK = re.compile(f"[{_RARE_BLANKS}]")
_SAFE_CUT = re.compile(r"[A-Za-z](?= [A-Za-z])|(?<=\S)\n(?=\S)")
"""Where every known expression begins another word, whatever stands before and after."""


class FastPath:
    """The tiktoken core with the merges of one tokenizer."""

    def __init__(self, merges: dict[bytes, int], ids: NDArray[np.uint32], pattern: str) -> None:
        import tiktoken

        self._ids = ids
        self._words = pattern.removesuffix(_LOOKING_AHEAD)
        self.marks = pattern != self._words and self._words in _KNOWN
        """Whether texts are marked and joined, instead of looking ahead in one after the other."""
        if self.marks:
            plain = self._words.removesuffix(_BEFORE_NUMBERS).replace("[^", r"[^\x00\x01")
            pattern = rf"[\x00\x01]|{plain}|\s+"
        # With no special token at all, the core tries every position of a text for one.
        special = {_BREAK + _END + _BREAK: len(merges)}
        self._core = tiktoken.Encoding(
            "same-merges", pat_str=pattern, mergeable_ranks=merges, special_tokens=special
        )
        self._break, self._end = merges[_BREAK.encode()], merges[_END.encode()]
        self._is_blank = np.isin(np.arange(256), list(b"\t\n\v\f\r "))
        last = "\t\v\f " if r"\s*[\r\n]+" in self._words else "\t\n\v\f\r "
        self._may_part = np.isin(np.arange(256), list(last.encode()))
        blank = "\t-\r " + _RARE_BLANKS
        self._rare_break = re.compile(f"[{blank}]+(?=[{last}{_RARE_BLANKS}][^{blank}{_BREAK}{_END}])")
        self._may_follow = ~self._is_blank & (np.arange(256) > 1)
        self._numbers_alone = self._words.endswith(_BEFORE_NUMBERS)
        if self._numbers_alone:
            self._may_follow &= ~np.isin(np.arange(256), list(b"0123456789"))

    def takes(self, text: str) -> bool:
        """Whether `encode` gives the ids of this text."""
        if _BREAK in text or _END in text:
            return False
        if not self.marks:
            return len(text) <= LONGEST_FAST
        return not self._numbers_alone or text.isascii() or not _RARE_BLANK.search(text)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Ids of texts, each of which it `takes`."""
        if not self.marks:
            return [self._ids[self._ranks(text)] for text in texts]
        encoded: list[Any] = [None] * len(texts)
        rare = [not text.isascii() and _RARE_BLANK.search(text) is not None for text in texts]
        for kind in (False, True):
            places = [place for place, is_rare in enumerate(rare) if is_rare is kind]
            if places:
                joined = "".join(texts[place] + _END for place in places)
                marked = self._rare_break.sub(rf"\g<0>{_BREAK}", joined) if kind else self._marked(joined)
                for place, ids in zip(places, self._split(marked), strict=True):
                    encoded[place] = ids
        return encoded

    def _ranks(self, text: str) -> NDArray[np.uint32]:
        ranks: NDArray[np.uint32] = self._core.encode_to_numpy(text, disallowed_special=())
        return ranks

    def _split(self, marked: str) -> Iterator[NDArray[np.uint32]]:
        ranks = self._ranks(marked)
        ranks = ranks[ranks != self._break]
        ends = np.flatnonzero(ranks == self._end)
        ids, start = self._ids[ranks], 0
        for end in ends.tolist():
            yield ids[start:end]
            start = end + 1

    def _marked(self, joined: str) -> str:
        data = np.frombuffer(joined.encode("utf-8"), dtype=np.uint8)
        parts = self._is_blank[data[:-2]]
        parts &= self._may_part[data[1:-1]]
        parts &= self._may_follow[data[2:]]
        places = np.flatnonzero(parts) + 1
        if self._numbers_alone:
            foreign = np.flatnonzero(data[places + 1] >= 0x80)
            numbers = [place for place in foreign.tolist() if _is_number_at(data, int(places[place]) + 1)]
            places = np.delete(places, numbers)
        return np.insert(data, places, 0).tobytes().decode("utf-8")


def _is_number_at(data: NDArray[np.uint8], place: int) -> bool:
    character = data[place : place + 4].tobytes().decode("utf-8", errors="ignore")[0]
    return unicodedata.category(character).startswith("N")


def cut_safely(text: str, length: int) -> list[str]:
    """`text` in stretches of about `length` that a tokenizer with a known expression encodes one by one."""
    stretches, start = [], 0
    while len(text) - start > length and (found := _SAFE_CUT.search(text, start + length)):
        stretches.append(text[start : found.end()])
        start = found.end()
    return [*stretches, text[start:]]


def is_known(raw: dict[str, Any]) -> bool:
    """Whether a tokenizer cuts words by an expression known here, and before anything else is done."""
    pattern = _split_pattern(raw.get("pre_tokenizer"))
    known = pattern is not None and pattern.removesuffix(_LOOKING_AHEAD) in _KNOWN
    return (
        known
        and raw.get("normalizer") is None
        and not any(
            token.get("lstrip") or token.get("rstrip") or re.search(r"\s", str(token["content"]))
            for token in raw.get("added_tokens") or []
        )
    )


def fast_path(raw: dict[str, Any]) -> FastPath | None:
    """The fast path of a `tokenizer.json`; None for any tokenizer but a plain byte-level BPE."""
    model, pattern = raw.get("model") or {}, _split_pattern(raw.get("pre_tokenizer"))
    if pattern is None or raw.get("normalizer") is not None or not _is_plain_bpe(model):
        return None
    characters = byte_characters()
    to_byte = {character: byte for byte, character in characters.items()}
    vocab: dict[str, int] = model["vocab"]
    tokens = list(characters.values())
    for merge in model["merges"]:
        tokens.append("".join(merge.split(" ") if isinstance(merge, str) else merge))
    tokens = list(dict.fromkeys(tokens))
    if any(token not in vocab for token in tokens) or not to_byte.keys() >= set("".join(tokens)):
        return None
    ranks = {bytes(map(to_byte.__getitem__, token)): rank for rank, token in enumerate(tokens)}
    return FastPath(ranks, np.array([vocab[token] for token in tokens], dtype=np.uint32), pattern)


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
            return _GPT2 + _LOOKING_AHEAD
        case [{"type": "Digits", "individual_digits": True}], True:
            return _GPT2_DIGITS + _LOOKING_AHEAD
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
