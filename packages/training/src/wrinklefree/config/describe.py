"""What every key is for, read from the schema itself."""

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from wrinklefree.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the configuration."""

    name: str
    accepted: str
    default: Any
    meaning: str


def described_keys(kind: type = RunConfig, prefix: str = "") -> Iterator[Key]:
    """All leaves of the schema, in its order."""
    hints, sentences = typing.get_type_hints(kind), _sentences(kind)
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from described_keys(hint, f"{prefix}{item.name}.")
            continue
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        shown = default.value if isinstance(default, Enum) else default
        yield Key(f"{prefix}{item.name}", accepted(hint), shown, sentences.get(item.name, ""))


def accepted(hint: Any) -> str:
    """A type in words."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " | ".join(str(member.value) for member in hint)
    names = {int: "whole number", float: "number", bool: "true | false", str: "text", type(None): "null"}
    if typing.get_origin(hint) in (list, dict):
        return "list" if typing.get_origin(hint) is list else "table"
    options = typing.get_args(hint)
    return " | ".join(accepted(option) for option in options) if options else names.get(hint, str(hint))


def _sentences(kind: type) -> dict[str, str]:
    """The text below each field of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found, last = {}, None
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and last is not None:
            found[last] = " ".join(str(node.value.value).split())
            last = None
        else:
            last = None
    return found
