"""Each option of each objective is in the table of docs/configuration_guide.md, with its default."""

import re
from dataclasses import fields
from pathlib import Path

import yaml

from wrinklefree.objectives import ObjectiveConfig
from wrinklefree.objectives.factory import KINDS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration_guide.md"
ROW = re.compile(r"^\| `(\w+)` \| `(\w+)` \| (?:none|`([^`]+)`) \| \S", re.M)


def test_every_option_of_every_objective_is_described_with_its_default() -> None:
    common = {field.name for field in fields(ObjectiveConfig)}
    expected = {
        (name, field.name, field.default)
        for name, kind in KINDS.items()
        for field in fields(kind.config)
        if field.name not in common
    }

    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))

    written = {
        (name, option, yaml.safe_load(value or "null")) for name, option, value in rows if name in KINDS
    }
    assert written == expected


def test_every_objective_is_described() -> None:
    text = PAGE.read_text(encoding="utf-8")

    assert all(re.search(rf"^\| `{name}`[^|]*\| [^`|]", text, re.M) for name in KINDS)
