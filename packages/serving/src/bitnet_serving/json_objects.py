"""Read the small json files beside a model: bounded, and refused in one line."""

import json
from pathlib import Path
from typing import Any

from durable import ExitCode, UserError

MOST_BYTES = 12_000_000
"""As objects they may take forty times as much."""


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a json file; UserError with exit code 4 for anything else."""
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError
        content = json.loads(text)
        if isinstance(content, dict):
            return content
        found = f"{type(content).__name__} where an object belongs"
    except (OSError, ValueError, RecursionError) as error:
        found = type(error).__name__
    raise UserError(
        f"{path}: cannot be read", found=found, fix="copy or save it again", exit_code=ExitCode.BAD_DATA
    )
