"""A checkpoint's tokenizer as an engine reads it, or an error where the engine would split text differently.

`tokenizer.json` (Hugging Face `tokenizers`) describes a pipeline: split at added tokens, normalise, split by
a regular expression, merge. Engines have a few fixed ones, see `tokenizer_pipelines`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bitnet_serving.gguf_values import MetaValue
from bitnet_serving.tokenizer_pipelines import byte_level, no_type, refuse_attributes, sentencepiece
from bitnet_serving.tokens import PREFIX, Tokens
from durable import ExitCode, UserError

TOKENIZER_NAME = "tokenizer.json"


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
    tokens = Tokens(path, pipeline, vocab_size=vocab_size, without=without)
    refuse_attributes(path, pipeline, tokens)
    if pipeline["model"].get("type") != "BPE":
        raise no_type(path, f"a {pipeline['model'].get('type')} model", "use a BPE tokenizer")
    notes: tuple[str, ...] = ()
    if pipeline["model"].get("byte_fallback"):
        kind, model = "SentencePiece", sentencepiece(path, pipeline, tokens)
    else:
        kind = "byte-level BPE"
        model, notes = byte_level(path, pipeline)
    texts, types = tokens.listed(escapes_space=kind == "SentencePiece")
    metadata: dict[str, MetaValue] = model | {f"{PREFIX}tokens": texts, f"{PREFIX}token_type": types}
    metadata |= _special_tokens(directory, path, tokens)
    metadata |= _chat_template(directory)
    pre = metadata.get(f"{PREFIX}pre")
    return TokenizerMetadata(
        metadata=metadata, kind=f"{kind} ({pre or metadata[f'{PREFIX}model']})", notes=notes
    )


def _special_tokens(directory: Path, path: Path, tokens: Tokens) -> dict[str, MetaValue]:
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
            raise no_type(
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


def _id_of(token: object, tokens: Tokens) -> int | None:
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
