"""A checkpoint's tokenizer as an engine reads it, or an error where the engine would split text differently.

`tokenizer.json` (Hugging Face `tokenizers`) describes a pipeline: split at added tokens, normalise, split by a
regular expression, merge. Engines have a few fixed pipelines, and choose one by a name:

    byte-level BPE   model gpt2, and a pre-type for each regular expression (`PRE_TYPES`)
    SentencePiece    spaces are ▁, unknown characters are bytes. Model llama merges the neighbours whose union has
                     the best score, whatever they are: exact where every way to make a token is a merge, as in
                     vocabularies that came from SentencePiece. Others: model gpt2 with pre-type sarvam-moe, which
                     knows merges, but no space in front of the text

A pipeline that none of these is, is refused: near misses load, and speak a little worse at every word.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bitnet_serving.gguf_values import MetaValue
from durable import ExitCode, UserError

TOKENIZER_NAME = "tokenizer.json"
PREFIX = "tokenizer.ggml."
SPACE = "▁"
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
NFC_NOTE = "engines do not compose characters (NFC) as this tokenizer does: give them composed text"


class TokenType(IntEnum):
    """What engines know of a token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


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


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerMetadata:
    """What a file says about the tokenizer."""

    metadata: dict[str, MetaValue]
    kind: str
    notes: tuple[str, ...] = ()


def read_tokenizer(directory: Path, *, vocab_size: int, without: int | None = None) -> TokenizerMetadata:
    """The tokenizer of a checkpoint, for a model of `vocab_size` rows, not counting that of `without`."""
    path = directory / TOKENIZER_NAME
    pipeline = _json(path)
    tokens = _Tokens(path, pipeline, vocab_size=vocab_size, without=without)
    _refuse_attributes(path, pipeline)
    if pipeline["model"].get("type") != "BPE":
        raise _no_type(path, f"a {pipeline['model'].get('type')} model", "use a BPE tokenizer")
    if pipeline["model"].get("byte_fallback"):
        kind, model, notes = "SentencePiece", _sentencepiece(path, pipeline, tokens), ()
    else:
        kind, model, notes = "byte-level BPE", *_byte_level(path, pipeline)
    texts, types = tokens.listed(escapes_space=kind == "SentencePiece")
    metadata: dict[str, MetaValue] = model | {f"{PREFIX}tokens": texts, f"{PREFIX}token_type": types}
    metadata |= _special_tokens(directory, path, tokens)
    metadata |= _chat_template(directory)
    pre = metadata.get(f"{PREFIX}pre")
    return TokenizerMetadata(
        metadata=metadata, kind=f"{kind} ({pre or metadata[f'{PREFIX}model']})", notes=notes
    )


class _Tokens:
    """Every token of the file by its id."""

    def __init__(
        self, path: Path, pipeline: Mapping[str, Any], *, vocab_size: int, without: int | None
    ) -> None:
        self.size = vocab_size
        vocab = pipeline["model"].get("vocab")
        if not isinstance(vocab, dict):
            raise _no_type(path, "no vocabulary with ids", "use a BPE tokenizer")
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


def _refuse_attributes(path: Path, pipeline: Mapping[str, Any]) -> None:
    for each in pipeline.get("added_tokens", ()):
        for name in ("lstrip", "rstrip", "single_word"):
            if each.get(name):
                raise _no_type(path, f"{each['content']} with {name}", f"save it with {name}=False")
    model = pipeline["model"]
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _no_type(path, f"{name} {model[name]!r}", "use a tokenizer without it")


def _byte_level(path: Path, pipeline: Mapping[str, Any]) -> tuple[dict[str, MetaValue], tuple[str, ...]]:
    normalizer = pipeline.get("normalizer")
    notes: tuple[str, ...] = ()
    if normalizer is not None:
        if normalizer != {"type": "NFC"}:
            raise _no_type(path, f"normalizer {_short(normalizer)}", "use a tokenizer without normaliser")
        notes = (NFC_NOTE,)
    pre_tokenizer = pipeline.get("pre_tokenizer")
    steps = tuple(_steps(path, pre_tokenizer))
    takes_words = bool(pipeline["model"].get("ignore_merges"))
    pre = PRE_TYPES.get((steps, takes_words))
    if pre is None:
        found = f"pre_tokenizer {_short(pre_tokenizer)}, ignore_merges {takes_words}"
        raise _no_type(path, found, f"accepted: those of {', '.join(PRE_TYPES.values())}")
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
            raise _no_type(
                path, f"pre_tokenizer {_short(each)}", f"accepted: those of {', '.join(PRE_TYPES.values())}"
            )


def _sentencepiece(path: Path, pipeline: Mapping[str, Any], tokens: _Tokens) -> dict[str, MetaValue]:
    missing = [text for text in BYTE_TOKENS if text not in tokens.ids]
    if missing:
        raise _no_type(path, f"no token {missing[0]}", "use a vocabulary with all 256 bytes")
    if pipeline["model"].get("ignore_merges"):
        raise _no_type(path, "ignore_merges with byte_fallback", "use a tokenizer without it")
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
        raise _no_type(
            path,
            "a space in front of the text, and tokens that only some pairs of their parts make",
            "use a tokenizer without prefix, or one that came from SentencePiece",
        )
    mixed = [text for text in tokens.texts.values() if "\n" in text and text.strip("\n")]
    mixed = [text for text in mixed if tokens.ids[text] not in tokens.added]
    if mixed:
        raise _no_type(path, f"the token {mixed[0]!r}", "use a tokenizer that splits at line ends")
    return {
        f"{PREFIX}model": "gpt2",
        f"{PREFIX}pre": "sarvam-moe",
        f"{PREFIX}merges": _merges(path, pipeline),
    }


def _has_prefix(path: Path, pipeline: Mapping[str, Any], tokens: _Tokens) -> bool:
    """Whether every text starts with a ▁ of its own, as the engine's `add_space_prefix` adds it."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    normalizer, pre_tokenizer = pipeline.get("normalizer"), pipeline.get("pre_tokenizer")
    # After the normaliser there is no space left to split at.
    no_split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
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
    raise _no_type(
        path,
        f"normalizer {_short(normalizer)}, pre_tokenizer {_short(pre_tokenizer)}",
        "replace spaces by ▁ in the normaliser, with or without a ▁ in front (Prepend), and do not split",
    )


def _scores(merges: list[tuple[str, str]], tokens: _Tokens) -> list[float] | None:
    """The later a token is made, the lower; None where merging whatever makes a token differs from `merges`."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    known = set(merges)
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
        last[left + right] = rank
    order = sorted(first, key=first.__getitem__)
    if any(last[one] > first[other] for one, other in zip(order, order[1:], strict=False)):
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
        raise _no_type(path, "no merges", "train the tokenizer on more text")
    return merges


def _pair(path: Path, merge: object) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    match parts:
        case [str(left), str(right)] if " " not in left + right:
            return left, right
    raise _no_type(path, f"the merge {merge!r}", "use a tokenizer whose tokens hold no spaces")


def _special_tokens(directory: Path, path: Path, tokens: _Tokens) -> dict[str, MetaValue]:
    config = _optional_json(directory / "tokenizer_config.json")
    ids = {name: _id_of(config.get(f"{name}_token"), tokens) for name in ("bos", "eos", "unk", "pad", "mask")}
    if ids["eos"] is None:
        # Without one, engines take whatever token has number 11 for the end.
        raise UserError(
            f"{path}: engines need to know the token that ends a text",
            found="no eos_token in tokenizer_config.json",
            fix="save the tokenizer with eos_token",
            exit_code=ExitCode.BAD_DATA,
        )
    ids["bos"] = ids["eos"] if ids["bos"] is None else ids["bos"]
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "mask": "mask"}
    metadata: dict[str, MetaValue] = {
        f"{PREFIX}{names[name]}_token_id": number for name, number in ids.items() if number is not None
    }
    front, behind = _added_around(path)
    for name, found in (("bos", front), ("eos", behind)):
        if found not in ([], [ids[name]]):
            raise _no_type(
                path, f"tokens {found} around a text", "let it add bos_token and eos_token or nothing"
            )
        metadata[f"{PREFIX}add_{name}_token"] = bool(found)
    return metadata


def _added_around(path: Path) -> tuple[list[int], list[int]]:
    """What the tokenizer puts in front of a text and behind it."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the binding raises nothing more precise
        raise _unreadable(path, str(error)) from None
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    begin = next(n for n in range(len(whole) + 1) if whole[n : n + len(bare)] == bare)
    return whole[:begin], whole[begin + len(bare) :]


def _id_of(token: object, tokens: _Tokens) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return tokens.ids.get(text) if isinstance(text, str) else None


def _chat_template(directory: Path) -> dict[str, MetaValue]:
    path = directory / "chat_template.jinja"
    template: object = (
        path.read_text(encoding="utf-8")
        if path.is_file()
        else _optional_json(directory / "tokenizer_config.json").get("chat_template")
    )
    if isinstance(template, list):  # several, by name
        template = next((each["template"] for each in template if each.get("name") == "default"), None)
    return {"tokenizer.chat_template": template} if isinstance(template, str) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("model"), dict):
            return content
        found = "no model in it"
    except FileNotFoundError:
        raise UserError(
            f"{path}: no tokenizer to put into the file",
            fix="save the model with its tokenizer, or name one: --tokenizer DIR",
            exit_code=ExitCode.BAD_DATA,
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        found = type(error).__name__
    raise _unreadable(path, found)


def _optional_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, type(error).__name__) from None
    return content if isinstance(content, dict) else {}


def _unreadable(path: Path, found: str) -> UserError:
    return UserError(
        f"{path}: cannot be read", found=found, fix="save the tokenizer again", exit_code=ExitCode.BAD_DATA
    )


def _no_type(path: Path, found: str, fix: str) -> UserError:
    return UserError(
        f"{path}: no engine splits text like this tokenizer", found, fix, exit_code=ExitCode.BAD_DATA
    )


def _short(part: Mapping[str, Any] | None) -> str:
    return json.dumps(part, ensure_ascii=False)
