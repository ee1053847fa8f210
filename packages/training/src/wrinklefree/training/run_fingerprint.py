"""What a run's numbers come from, and one hash of it: configuration, code, data, tokenizer, versions.

`fingerprint.json` lies in the run directory and is written anew by every life of a run. Where a run lives and
how often it is saved or printed is not part of the hash; uncommitted changes are told, but not hashed.
"""

import hashlib
import json
import logging
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from durable import publish_file
from wrinklefree.training.resuming import FREE, differences
from wrinklefree.versions import installed_versions

logger = logging.getLogger(__name__)
FILE_NAME = "fingerprint.json"
COUNTED = (
    "distributed",
    "training.max_steps",
    "training.total_tokens",
    "training.batch_size",
    "training.gradient_accumulation_steps",
)
"""A resume may change these, but the numbers are others then."""
IGNORED = tuple(key for key in FREE if key not in COUNTED)
UNKNOWN = "unknown"


def generate_fingerprint(
    config: Mapping[str, Any],
    *,
    data: Mapping[str, Any] | None = None,
    ignore_keys: Iterable[str] = IGNORED,
    include_git: bool = True,
    repo_path: Path | None = None,
) -> tuple[str, dict[str, Any]]:
    """The hash (sha256, hex) and what it is made of, which is what `fingerprint.json` holds."""
    commit, is_dirty = get_git_info(repo_path) if include_git else (UNKNOWN, False)
    versions = installed_versions()
    hashed = {
        "configuration": clean_config_for_hashing(config, ignore_keys),
        "commit": commit,
        "data": dict(data or {}),
        "versions": versions,
    }
    digest = hashlib.sha256(canonical(hashed).encode()).hexdigest()
    return digest, {
        "fingerprint": digest,
        "git": {"commit": commit, "uncommitted_changes": is_dirty},
        "versions": versions,
        "data": dict(data or {}),
        "configuration": dict(config),
    }


def clean_config_for_hashing(config: Mapping[str, Any], ignore_keys: Iterable[str]) -> dict[str, Any]:
    """Without the ignored keys and without tables that are empty then."""
    ignored = set(ignore_keys)

    def cleaned(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for name, value in tree.items():
            if f"{prefix}{name}" in ignored:
                continue
            item = cleaned(value, f"{prefix}{name}.") if isinstance(value, Mapping) else value
            if not isinstance(item, Mapping) or item:
                kept[str(name)] = item
        return kept

    return cleaned(config, "")


def canonical(content: Any) -> str:
    """JSON with one spelling: sorted keys, no spaces."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def get_git_info(repo_path: Path | None = None) -> tuple[str, bool]:
    """Commit and whether tracked files differ from it; ("unknown", False) outside a checkout.

    Without a path, of the checkout that this code is in: an environment inside somebody's repository is
    not tracked there.
    """
    here = repo_path or Path(__file__).parent
    if repo_path is None and _git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return UNKNOWN, False
    described = _git(here, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    if described is None:
        return UNKNOWN, False
    commit, dash, _ = described.strip().partition("-")
    return commit, bool(dash)


def write_fingerprint(directory: Path, config: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Write `fingerprint.json`; says what changed since the life before."""
    _, content = generate_fingerprint(config, data=data)
    path = directory / FILE_NAME
    before = read_fingerprint(directory)
    if before is not None:
        parts = ("git", "versions", "data")
        for key, old, new in differences(
            {name: before.get(name, {}) for name in parts}, {name: content[name] for name in parts}
        ):
            logger.warning("since this run began, %s changed: %s → %s", key, old, new)
    with publish_file(path, replace=True) as file:
        file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_fingerprint(directory: Path) -> dict[str, Any] | None:
    """What a run directory holds; none where there is nothing to read."""
    try:
        content = json.loads((directory / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _git(directory: Path, *arguments: str) -> str | None:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        answer = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
            env=environment,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout
