"""Take secrets out of text before a person, a log or a report sees it.

Three nets, widest last: shapes that only credentials have (`hf_…`, `sk-…`, web tokens, PEM keys,
`Authorization:` headers, `user:password@` in a URL); values written after a name that says so (`api_key=…`,
`"HF_TOKEN": "…"`, `--password …`); and, anywhere, the values of environment variables with such a name.

The names of this trade get in the way: `mask_token`, `max_tokens`, `num_key_value_heads`, `sort_key` hold no
secret, and a key named in prose (`unknown key: model`) is followed by something that the reader needs.
"""

import os
import re
from collections.abc import Iterator
from enum import Enum, auto
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote

MASK = "***"

_SHORTEST_ENVIRONMENT_SECRET = 8
_LONGEST_NAME = 100

_SHAPES = re.compile(
    r"""-----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----.*?(?:-----END[ ][A-Z ]*PRIVATE[ ]KEY-----|\Z)
    |(?<![A-Za-z0-9])(?:
         hf_[A-Za-z0-9]{16,}
        |sk-(?=[\w-]{0,99}\d)[\w-]{16,}
        |gh[pousr]_[A-Za-z0-9]{16,}
        |github_pat_\w{16,}
        |glpat-[\w-]{16,}
        |xox[abeoprs]-[\w-]{10,}
        |(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])
        |AIza[\w-]{35}
    )
    |(?<![\w-])eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{4,}""",
    re.VERBOSE | re.DOTALL,
)
_URL_CREDENTIALS = re.compile(
    r"""(?<=://)(?:
         (?!(?:git|hg)@)[^/?\#\s"'<>]+@
        |[^/?\#\s"'<>:@]+:(?!\d{1,5}(?:/|\Z))[^\s"'<>]{0,200}@   # a password with a slash that nobody encoded
    )""",
    re.VERBOSE,
)
_BEFORE_A_SECRET = [
    re.compile(r"(?i)(authorization[\\\"']*\s*[:=]\s*[\\\"']*(?:bearer|basic|token)\s+)[^\s\\\"',;]+"),
    re.compile(r"(?i)(\bbearer\s+)(?=[\w.~+/-]*\d)[^\s\\\"',;]+"),
    re.compile(
        r"(?i)(\b(?:wandb|key|login|token)[\"'\s:=]+)[0-9a-f]{40}\b"
    ),  # alone, 40 digits are a git commit
    re.compile(r"(?i)(\blogin\s+\S+\s+password\s+)\S+"),  # netrc
    re.compile(r"(?i)([?&](?:key|sig|[\w-]*signature|[\w-]*credential)=)[^\s&#\"']+"),
]
_OPTION = re.compile(r"(?<!\S)(--?(?P<name>[A-Za-z][\w.-]*)[ \t]+)(?P<value>[^\s-]\S*)")

# `api_key=`, `"api_key": `, `environ['API_KEY'] = `, `api_key: str = `. The value is matched apart from this:
# in `env: HF_TOKEN=x` the harmless first name must not swallow the second.
_NAME = re.compile(
    r"""(?<![\w.-])(?P<name>[\w.-]+)
    (?P<separator>[\\"'\]]{0,4}[ \t]*(?:
        :[ \t]*(?:str|bytes|SecretStr)(?:[ ]?\|[ ]?None)?[ \t]*=|=>|:=|==?|:
    )[ \t]*)""",
    re.VERBOSE,
)
_VALUE = re.compile(
    r"""(?P<quoted>
        \w{0,2}"(?:[^"\\]|\\.)*"?|\w{0,2}'(?:[^'\\]|\\.)*'?|\\+"[^"]*"|\\+'[^']*'|\[[^\]\n]*\]
    )
    |\S+?(?=[,;)}\]]{0,8}(?:\s|$)|[,;&]["']?[\w.-]{1,99}["']?[=:])""",
    re.VERBOSE | re.DOTALL,
)
_PLACEHOLDER = re.compile(
    r"(?i)[\\\"']*(?:\*{3,}|<[^>]*>?|\$\{?\w.*|\.{3}|…|null|none|true|false|)[\\\"']*\Z"
)
_RANDOM = re.compile(r"(?=\S*\d)(?=\S*[A-Za-z])[A-Za-z0-9+/=]{16,}\Z")
_PROSE = re.compile(
    r"""(?ix)(?:a|an|and|are|cannot|could|does|empty|expected|for|found|has|in|instead|invalid|is|it|may|missing
    |must|needs|no|not|of|on|or|please|required|set|should|the|this|to|unknown|unset|use|value|was|were|wrong)
    [.!?]?\Z"""
)

_SECRET_ANYWHERE = re.compile(
    r"(?:SECRETS?|PASSWORD|PASSWD|PASSPHRASE|APIKEY|AUTHTOKEN|ACCESSTOKEN|ACCESSKEY|CREDENTIALS?)\Z"
)
_HARMLESS_LAST = re.compile(
    r"(?:COUNT|DIR|ENABLED|FILE|LEN|LENGTH|NAME|PATH|POLICY|REQUIRED|TIMEOUT|TTL|TYPE|URL)\Z"
)
_HARMLESS_BEFORE_KEY = re.compile(
    r"""(?x)(?:CACHE|COLUMN|CONFIG|DATA|DICT|DIFFERENT|DUPLICATE|EACH|EVERY|FOREIGN|GROUP|INDEX|LABEL|LOOKUP
    |LOSS|METRIC|MISSING|PARTITION|PRIMARY|PUBLIC|QUERY|SAMPLES?|SORT|STATE|STEP|TEXT|UNKNOWN|WEIGHT)\Z"""
)
_HARMLESS_BEFORE_TOKEN = re.compile(
    r"""(?x)(?:ADDED|ANY|BLANK|BOS|BYTE|CLS|CONTROL|EACH|END|EOS|EVERY|EXTRA|FIRST|IMAGE|LAST|MASK|MAX|MIN|NEXT
    |NUM|PAD|PER|PREVIOUS|SEP|SPECIAL|START|STOP|TEXT|THE|UNK|UNKNOWN)\Z"""
)


def mask_secrets(text: str) -> str:
    """`text` with all that looks like a credential replaced by `***`; once masked, it stays the same."""
    for value in _environment_secrets():
        text = text.replace(value, MASK)
    text = _SHAPES.sub(MASK, text)
    text = _URL_CREDENTIALS.sub(MASK + "@", text)
    for pattern in _BEFORE_A_SECRET:
        text = pattern.sub(lambda match: match[1] + MASK, text)
    return _OPTION.sub(_mask_option, _mask_named_values(text))


def is_secret_name(name: str) -> bool:
    """Whether something of this name holds a credential: `HF_TOKEN`, `wandb.apiKey`, but not `pad_token`."""
    return _kind(name[-_LONGEST_NAME:]) is _Kind.SECRET


class _Kind(Enum):
    """What a name says about its value."""

    SECRET = auto()
    TOKEN = auto()
    """Just `token`: a credential in `token=abc`, a word in `unknown token: the`."""
    KEY = auto()
    """Just `key`: a word, unless what follows reads like noise."""
    HARMLESS = auto()


@lru_cache(maxsize=4096)
def _kind(name: str) -> _Kind:
    words = _words(name)
    before, last = ("", "", *words)[-2:]
    if _HARMLESS_LAST.match(last):
        return _Kind.HARMLESS
    if any(_SECRET_ANYWHERE.match(word) for word in words) or (before, last) == ("API", "KEYS"):
        return _Kind.SECRET
    match last:
        case "KEY" if not before:
            return _Kind.KEY
        case "TOKEN" if not before:
            return _Kind.TOKEN
        case "KEY" if not _HARMLESS_BEFORE_KEY.match(before):
            return _Kind.SECRET
        case "TOKEN" if not _HARMLESS_BEFORE_TOKEN.match(before):
            return _Kind.SECRET
    return _Kind.HARMLESS


def _words(name: str) -> list[str]:
    """`training.wandb.apiKey_2` is about `["API", "KEY"]`: the last part of the path, without its number."""
    last = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.rstrip(".").rpartition(".")[2])
    words = [word for word in re.split(r"[_\-]+", last.upper()) if word]
    while words and words[-1].isdigit():
        words.pop()
    return words


def _environment_secrets() -> Iterator[str]:
    """Values worth hiding, longest first so that none is cut by a shorter one; no short words, no paths."""
    values = {value for name, value in os.environ.items() if _kind(name) in (_Kind.SECRET, _Kind.TOKEN)}
    for value in sorted(values, key=len, reverse=True):
        if len(value) < _SHORTEST_ENVIRONMENT_SECRET or _PLACEHOLDER.match(value) or _is_path(value):
            continue
        yield value
        if (encoded := quote(value, safe="")) != value:
            yield encoded


def _is_path(value: str) -> bool:
    return len(value) < 4096 and value.startswith("/") and os.path.lexists(Path(value))


def _mask_named_values(text: str) -> str:
    pieces: list[str] = []
    position = 0
    while name := _NAME.search(text, position):
        kind = _kind(name["name"][-_LONGEST_NAME:])
        value = None if kind is _Kind.HARMLESS else _VALUE.match(text, name.end())
        if value is not None and _holds_a_secret(kind, value, assigned="=" in name["separator"]):
            pieces += [text[position : name.end()], _mask_value(value)]
            position = value.end()
        else:
            pieces.append(text[position : name.end()])
            position = name.end()
    return "".join(pieces) + text[position:]


def _mask_value(value: re.Match[str]) -> str:
    """Keeps plain quotes, so that masked JSON and YAML still parse."""
    quote_mark = value[0][0] if value[0][0] in "\"'" and value[0].endswith(value[0][0]) else ""
    return quote_mark + MASK + quote_mark


def _holds_a_secret(kind: _Kind, value: re.Match[str], *, assigned: bool) -> bool:
    if _PLACEHOLDER.match(value[0]):
        return False
    if kind is _Kind.SECRET:
        return assigned or value["quoted"] is not None or not _PROSE.match(value[0])
    if kind is _Kind.TOKEN and assigned:
        return not value[0].isdigit()
    # In `unknown key: model` the colon assigns nothing, unless what follows reads like noise.
    return _RANDOM.match(value[0].strip("\\\"'")) is not None


def _mask_option(match: re.Match[str]) -> str:
    is_secret = _kind(match["name"][-_LONGEST_NAME:]) in (_Kind.SECRET, _Kind.TOKEN)
    return match[1] + MASK if is_secret and not _PLACEHOLDER.match(match["value"]) else match[0]
