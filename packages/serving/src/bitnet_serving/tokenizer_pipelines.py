"""The fixed ways in which engines split text, and which of them a `tokenizer.json` is.

    byte-level BPE   model `gpt2`, with a pre-type for each regular expression (`PRE_TYPES`)
    SentencePiece    spaces are ▁, and unknown characters are bytes. Model `llama` merges the neighbours whose
                     union has the best score, whatever they are: exact where every way to make a token is a
                     merge, as in vocabularies that came from SentencePiece. For others model `gpt2` with
                     pre-type `sarvam-moe`, which knows merges, but no space in front of the text

A pipeline that none of these is, is refused: near misses load, and speak a little worse at every word.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from bitnet_serving.gguf_values import MetaValue
from bitnet_serving.tokens import BYTE_TOKENS, PREFIX, SPACE, Tokens
from durable import ExitCode, UserError

NFC_NOTE = "engines do not compose characters (NFC) as this tokenizer does: give them composed text"

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2_SPELT_OUT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = "digits"
"""Stands for the step that makes every digit a piece of its own."""
PRE_TYPES: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
}
"""Steps in front of byte-level BPE, and whether a word that is a token is taken whole → the engine's name."""


def refuse_attributes(path: Path, pipeline: Mapping[str, Any], tokens: Tokens) -> None:
    """What no engine's file can say."""
    for each in tokens.added.values():
        for name in ("lstrip", "rstrip", "single_word"):
            if each.get(name):
                raise no_type(path, f"{each['content']} with {name}", f"save it with {name}=False")
    model = pipeline["model"]
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise no_type(path, f"{name} {model[name]!r}", "use a tokenizer without it")


def byte_level(path: Path, pipeline: Mapping[str, Any]) -> tuple[dict[str, MetaValue], tuple[str, ...]]:
    """What to write for byte-level BPE, and what to know about it."""
    normalizer = pipeline.get("normalizer")
    notes: tuple[str, ...] = ()
    if normalizer is not None:
        if normalizer != {"type": "NFC"}:
            raise no_type(path, f"normalizer {_short(normalizer)}", "use a tokenizer without normaliser")
        notes = (NFC_NOTE,)
    pre_tokenizer = pipeline.get("pre_tokenizer")
    steps = tuple(_steps(path, pre_tokenizer))
    takes_words = bool(pipeline["model"].get("ignore_merges"))
    pre = PRE_TYPES.get((steps, takes_words))
    if pre is None:
        found = f"pre_tokenizer {_short(pre_tokenizer)}, ignore_merges {takes_words}"
        raise no_type(path, found, f"accepted: those of {', '.join(PRE_TYPES.values())}")
    return {
        f"{PREFIX}model": "gpt2",
        f"{PREFIX}pre": pre,
        f"{PREFIX}merges": _merges(path, pipeline),
    }, notes


def _steps(path: Path, pre_tokenizer: Mapping[str, Any] | None) -> Iterator[str]:
    """The splits of a pre-tokenizer in order, as `PRE_TYPES` spells them."""
    each = dict(pre_tokenizer or {})
    match each:
        case {"type": "Sequence", "pretokenizers": list(parts)}:
            for part in parts:
                yield from _steps(path, part)
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(use_regex)}:
            if use_regex:
                yield GPT2
        case {"type": "Digits", "individual_digits": True}:
            yield DIGITS
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False}:
            yield GPT2 if regex == _GPT2_SPELT_OUT else regex
        case _:
            raise no_type(
                path, f"pre_tokenizer {_short(each)}", f"accepted: those of {', '.join(PRE_TYPES.values())}"
            )


def sentencepiece(path: Path, pipeline: Mapping[str, Any], tokens: Tokens) -> dict[str, MetaValue]:
    """What to write for BPE over characters with bytes for the unknown ones."""
    missing = [text for text in BYTE_TOKENS if text not in tokens.ids]
    if missing:
        raise no_type(path, f"no token {missing[0]}", "use a vocabulary with all 256 bytes")
    if pipeline["model"].get("ignore_merges"):
        raise no_type(path, "ignore_merges with byte_fallback", "use a tokenizer without it")
    has_prefix = _has_prefix(path, pipeline, tokens)
    merges = [_pair(path, each) for each in pipeline["model"]["merges"]]
    scores = _scores(merges, tokens)
    if scores is not None:
        return {
            f"{PREFIX}model": "llama",
            f"{PREFIX}scores": scores,
            f"{PREFIX}add_space_prefix": has_prefix,
        }
    if has_prefix:
        raise no_type(
            path,
            "a space in front of the text, and tokens that only some pairs of their parts make",
            "use a tokenizer without prefix, or one that came from SentencePiece",
        )
    mixed = [text for text in tokens.texts.values() if "\n" in text and text.strip("\n")]
    mixed = [text for text in mixed if tokens.ids[text] not in tokens.added]
    if mixed:
        raise no_type(path, f"the token {mixed[0]!r}", "use a tokenizer that splits at line ends")
    return {
        f"{PREFIX}model": "gpt2",
        f"{PREFIX}pre": "sarvam-moe",
        f"{PREFIX}merges": _merges(path, pipeline),
    }


def _has_prefix(path: Path, pipeline: Mapping[str, Any], tokens: Tokens) -> bool:
    """Whether every text starts with a ▁ of its own, as the engine's `add_space_prefix` adds it."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    normalizer, pre_tokenizer = pipeline.get("normalizer"), pipeline.get("pre_tokenizer")
    # After the normaliser there is no space left to split at.
    no_split = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    if pre_tokenizer in (None, no_split):
        if normalizer == replace:
            return False
        if normalizer == {"type": "Sequence", "normalizers": [prepend, replace]}:
            return True
    elif normalizer is None and pre_tokenizer.get("type") == "Metaspace":
        inside = any(SPACE in text[1:] for number, text in tokens.texts.items() if number not in tokens.added)
        never = pre_tokenizer.get("prepend_scheme") == "never" and pre_tokenizer.get("replacement") == SPACE
        if never and not (pre_tokenizer.get("split", True) and inside):
            return False
    raise no_type(
        path,
        f"normalizer {_short(normalizer)}, pre_tokenizer {_short(pre_tokenizer)}",
        "replace spaces by ▁ in the normaliser, with or without a ▁ in front (Prepend), and do not split",
    )


def _scores(merges: list[tuple[str, str]], tokens: Tokens) -> list[float] | None:
    """The later a token is made, the lower; None where merging whatever makes a token is not `merges`."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    known = set(merges)
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
        last[left + right] = rank
    order = sorted(first, key=first.__getitem__)
    if any(last[one] > first[other] for one, other in pairwise(order)):
        return None
    for text, number in tokens.ids.items():
        if number in tokens.added and text not in BYTE_TOKENS:
            continue  # cut out of the text before anything is merged
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            made = (len(left) == 1 or left in tokens.ids) and (len(right) == 1 or right in tokens.ids)
            if made and (left, right) not in known:
                return None
    position = {text: float(-index) for index, text in enumerate(order)}
    return [position.get(tokens.texts.get(number, ""), 0.0) for number in range(tokens.size)]


def _merges(path: Path, pipeline: Mapping[str, Any]) -> list[str]:
    merges = [" ".join(_pair(path, each)) for each in pipeline["model"]["merges"]]
    if not merges:
        raise no_type(path, "no merges", "train the tokenizer on more text")
    return merges


def _pair(path: Path, merge: object) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    match parts:
        case [str(left), str(right)] if " " not in left + right:
            return left, right
    raise no_type(path, f"the merge {merge!r}", "use a tokenizer whose tokens hold no spaces")


def no_type(path: Path, found: str, fix: str) -> UserError:
    """For whatever engines do otherwise."""
    return UserError(
        f"{path}: no engine splits text like this tokenizer", found, fix, exit_code=ExitCode.BAD_DATA
    )


def _short(part: Mapping[str, Any] | None) -> str:
    return json.dumps(part, ensure_ascii=False)
