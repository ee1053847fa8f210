"""`wrinklefree doctor` says what is there, in both forms, and never what a credential is."""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import pytest
import torch

SECRET = "hf_" + "nobody" * 6


class Ended(Protocol):
    """What the fixture `wrinklefree` gives back."""

    exit_code: int
    out: str
    err: str


Run = Callable[..., Ended]


def test_it_prints_the_versions_and_the_route_of_the_product(wrinklefree: Run) -> None:
    ended = wrinklefree("doctor")

    assert (ended.exit_code, ended.err) == (0, "")
    for expected in (version("torch"), version("transformers"), "BitLinear", "forward: "):
        assert expected in ended.out


def test_json_holds_the_same(wrinklefree: Run) -> None:
    report = json.loads(wrinklefree("doctor", "--json").out)

    assert set(report) == {"versions", "torch", "cpu", "gpu", "compiler", "space", "credentials"}
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_a_credential_is_set_or_not_and_never_shown(
    wrinklefree: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")

    ended = wrinklefree("doctor", "--json")

    assert json.loads(ended.out)["credentials"] == {
        "hugging face": "set (HF_TOKEN)",
        "weights & biases": "set (.netrc)",
    }
    assert SECRET not in ended.out + ended.err


def test_without_a_compiler_it_says_what_to_set(wrinklefree: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)

    assert "TORCHDYNAMO_DISABLE=1" in wrinklefree("doctor").out
