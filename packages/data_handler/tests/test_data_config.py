"""Configs: what is wrong with one is said with its key."""

import re
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_handler.cli import app
from data_handler.config import list_available_configs, load_data_config, parse_data_config
from data_handler.reaching import reach
from durable import UserError


@pytest.mark.parametrize("name", list_available_configs())
def test_every_shipped_config_loads_and_its_weights_sum_to_one(name: str) -> None:
    assert sum(load_data_config(name).weights.values()) == pytest.approx(1.0, abs=1e-12)


def test_the_pretraining_mixture_leaves_its_sixth_source_out() -> None:
    config = load_data_config("mixed_pretrain")

    assert len(config.sources) == 6
    assert "synth" not in config.weights
    assert config.weights["fineweb_edu"] == pytest.approx(0.35)


def test_a_misspelt_name_is_answered_with_the_right_one() -> None:
    with pytest.raises(UserError, match="did you mean 'fineweb'"):
        load_data_config("finewebb")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{path: a, weight: -1}", "sources.s.weight"),
        ("{path: a, weight: .nan}", "sources.s.weight"),
        ("{path: a, weight: .inf}", "sources.s.weight"),
        ("{path: a, weight: 0}", "weights of s must sum"),
        ("{path: a, weigth: 1}", "did you mean 'weight'"),
        ("{path: a, format: jsnol}", "did you mean 'jsonl'"),
        ("{path: a, max_tokens: 1.5}", "max_tokens must be of type int"),
        ("{path: a, drop_duplicates: 1}", "drop_duplicates must be of type bool"),
        ("{weight: 1}", "path is missing"),
        ("&x [*x]", "alias"),
        ("[" * 200_000, "more than 16 deep"),
        ("A" * 300_000, "larger than any config"),
    ],
)
def test_a_wrong_value_is_named(source: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_data_config(f"name: t\nsources: {{s: {source}}}".encode(), where="t.yaml")

    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden"])
def test_a_source_cannot_lead_out_of_its_directory(name: str) -> None:
    with pytest.raises(UserError, match="a source has a name"):
        parse_data_config(f"name: t\nsources: {{'{name}': {{path: a}}}}".encode(), where="t.yaml")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text("[]{}:-,&*!|>'\" \nabsource.0e", max_size=60).map(str.encode))
def test_no_text_ends_in_a_traceback(raw: bytes) -> None:
    with suppress(UserError):
        parse_data_config(b"name: t\nsources: " + raw, where="t.yaml")


def test_an_address_that_fails_is_tried_three_times() -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise ConnectionError("down")

    with pytest.raises(UserError, match="cannot be reached") as caught:
        reach("https://user:secret@host.test/x", fail, pause_seconds=0.001)

    assert len(calls) == 3
    assert caught.value.exit_code == 4
    assert "secret" not in str(caught.value)


def test_an_address_that_never_answers_is_given_up() -> None:
    started = time.monotonic()

    with pytest.raises(UserError, match="no answer"):
        reach("https://host.test", lambda: time.sleep(5), timeout_seconds=0.2)

    assert time.monotonic() - started < 2


def test_the_command_line_lists_and_shows() -> None:
    listed = CliRunner().invoke(app, ["list"])
    shown = CliRunner().invoke(app, ["show", "mixed_pretrain"])

    assert all(name in listed.output for name in list_available_configs())
    assert "0.350" in shown.output
    assert "CDLA-Permissive-2.0" in shown.output


def test_the_command_line_prepares_verifies_and_previews(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "the owl"}\n{"text": "the fox"}\n')
    (tmp_path / "c.yaml").write_text(f"name: c\nsources: {{owls: {{path: {tmp_path / 'a.jsonl'}}}}}")
    run, out = CliRunner(), str(tmp_path / "out")

    prepared = run.invoke(app, ["prepare", str(tmp_path / "c.yaml"), "--out", out])
    verified = run.invoke(app, ["verify", out])
    counted = run.invoke(app, ["stats", out])
    previewed = run.invoke(app, ["preview", str(tmp_path / "c.yaml"), "-n", "1"])

    assert "2 documents" in prepared.output
    assert "all as written" in verified.output
    assert "100.0%" in counted.output
    assert "the owl<|endoftext|>" in previewed.output
    assert "fox" not in previewed.output


def test_stats_tells_training_and_probe_apart(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(80)))
    source = f"{{path: {tmp_path / 'a.jsonl'}, probe_one_in: 4}}"
    (tmp_path / "c.yaml").write_text(f"name: c\nsources: {{owls: {source}}}")
    CliRunner().invoke(app, ["prepare", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out")])

    told = CliRunner().invoke(app, ["stats", str(tmp_path / "out")]).output.splitlines()[0]

    trained, held = map(int, re.findall(r"(\d+) documents", told))
    assert trained + held == 80
    assert 0 < held < trained
    assert "in the probe" in told
