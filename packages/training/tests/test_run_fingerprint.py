"""The fingerprint of a run: the same for the same numbers, another when something changes them."""

import json
import logging
import subprocess
from pathlib import Path
from typing import Any

import pytest

from wrinklefree.config import load_config, to_dict
from wrinklefree.training.run_fingerprint import (
    generate_fingerprint,
    get_git_info,
    read_fingerprint,
    write_fingerprint,
)

DATA = {"sources": {"web": "aa"}, "tokenizer": "bb"}


def config(*overrides: str) -> dict[str, Any]:
    return to_dict(load_config(["model=tiny_llama", *overrides]))


def fingerprint(*overrides: str, data: dict[str, Any] = DATA) -> str:
    return generate_fingerprint(config(*overrides), data=data)[0]


def test_it_is_a_sha256_that_no_order_of_keys_changes() -> None:
    tree = config()
    backwards = {name: tree[name] for name in reversed(tree)}

    assert len(fingerprint()) == 64
    assert generate_fingerprint(backwards, data=DATA)[0] == fingerprint()


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        ("training.optimizer.lr_muon=0.1", True),
        ("seed=1", True),
        ("training.max_steps=7", True),
        ("training.batch_size=1", True),
        ("distributed=ddp", True),
        ("output_dir=elsewhere", False),
        ("experiment_name=other", False),
        ("data.num_workers=1", False),
        ("training.checkpoint.save_interval=7", False),
        ("training.logging.log_interval=7", False),
        ("training.logging.wandb.project=other", False),
        ("training.resume.auto=false", False),
    ],
)
def test_what_changes_numbers_changes_it_and_nothing_else_does(override: str, changes: bool) -> None:
    assert (fingerprint(override) != fingerprint()) is changes


def test_other_tokens_and_another_tokenizer_change_it() -> None:
    assert len({fingerprint(), fingerprint(data=DATA | {"tokenizer": "cc"}), fingerprint(data={})}) == 3


def test_git_tells_the_commit_and_uncommitted_changes(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert get_git_info(tmp_path) == ("unknown", False)
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert get_git_info(tmp_path) == (commit, False)
    clean = generate_fingerprint({}, repo_path=tmp_path)[0]

    (tmp_path / "file").write_text("two")

    assert get_git_info(tmp_path) == (commit, True)
    assert generate_fingerprint({}, repo_path=tmp_path)[0] == clean
    git("commit", "-am", "second")
    assert generate_fingerprint({}, repo_path=tmp_path)[0] != clean


def test_another_life_says_what_changed_since_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_fingerprint(tmp_path, config(), DATA)
    content = json.loads((tmp_path / "fingerprint.json").read_text())
    assert content["fingerprint"] == fingerprint()
    content["versions"]["torch"] = "1.0"
    (tmp_path / "fingerprint.json").write_text(json.dumps(content))

    with caplog.at_level(logging.WARNING):
        write_fingerprint(tmp_path, config(), DATA)

    assert "versions.torch changed: 1.0 → " in caplog.text
    assert len(caplog.records) == 1
    (tmp_path / "fingerprint.json").write_text("torn {")
    assert read_fingerprint(tmp_path) is None
