"""What a user reads when something is wrong: one line, the closest names, and an exit code."""

import copy
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from durable import ExitCode, UserError, error_line


def test_an_error_says_what_was_found_and_what_to_do() -> None:
    error = UserError("training.max_steps: must be 1 or more", found=-3, fix="set a positive number")

    assert error_line(error) == (
        "error: training.max_steps: must be 1 or more (found -3); fix: set a positive number"
    )
    assert error.exit_code == 2


def test_parts_that_were_not_given_leave_no_trace() -> None:
    assert str(UserError("out: is not empty")) == "out: is not empty"
    assert (
        str(UserError("out: is not empty", fix="choose another")) == "out: is not empty; fix: choose another"
    )
    assert str(UserError("lr: is not a number", found="")) == "lr: is not a number (found '')"
    assert str(UserError("lr: is zero", found=0)) == "lr: is zero (found 0)"


def test_exit_codes_are_those_that_the_commands_promise() -> None:
    assert {code.name: code.value for code in ExitCode} == {
        "BAD_INPUT": 2,
        "BUSY": 3,
        "BAD_DATA": 4,
        "CANNOT_WRITE": 5,
        "DIVERGED": 6,
        "DISTRIBUTED": 7,
    }


def test_a_misspelt_name_is_answered_with_the_closest_one_and_all_choices_closest_first() -> None:
    error = UserError(
        "training: no such preset", found="unifed", choices=["base", "lrc", "unified", "unitary"]
    )

    assert str(error) == (
        "training: no such preset (found unifed); "
        "fix: did you mean 'unified'? accepted: unified, unitary, base, lrc"
    )


@pytest.mark.parametrize(
    "found", ["trainig.max_steps", "trainer.max_steps", "Training.MAX_STEPS", "'max_steps'"]
)
def test_a_dotted_key_is_recognised_by_its_whole_and_by_its_last_part(found: str) -> None:
    choices = ["data.max_length", "training.lr", "model.max_steps_seen", "training.max_steps"]

    assert "did you mean 'training.max_steps'?" in str(
        UserError(f"{found}: unknown key", found, choices=choices)
    )


def test_a_right_last_part_outweighs_a_longer_likeness() -> None:
    choices = ["max_shards", "training.optimizer.muon.max_steps"]

    assert "did you mean 'training.optimizer.muon.max_steps'?" in str(
        UserError("x", "max_steps", choices=choices)
    )


def test_nothing_is_suggested_when_nothing_is_close() -> None:
    error = UserError("optimizer: no such choice", found="zzz", choices=["adamw", "muonclip"])

    assert str(error) == "optimizer: no such choice (found zzz); fix: use one of: adamw, muonclip"


def test_a_given_fix_stands_before_the_choices() -> None:
    error = UserError("stage: unknown", "stage4", "see --help", choices=["stage3"])

    assert str(error).endswith("fix: see --help; did you mean 'stage3'? accepted: stage3")


def test_many_choices_are_cut_to_the_closest_dozen() -> None:
    error = UserError("layer: unknown", found="layer23", choices=[f"layer_{index}" for index in range(40)])

    assert "did you mean 'layer_23'? accepted: layer_23, " in str(error)
    assert str(error).count("layer_") == 1 + 12
    assert str(error).endswith(" and 28 more")


def test_an_error_is_one_printable_line_whatever_goes_in() -> None:
    hostile = "a\nb\r\nc\u2028d\x1b[31mred\x00\u202eltr \udc80"

    text = str(UserError(hostile, found=hostile, fix=hostile, choices=[hostile]))

    assert len(text.splitlines()) == 1
    assert text.isprintable()
    assert "a b c d\\x1b[31mred" in text


def test_a_very_long_value_loses_its_middle() -> None:
    text = str(UserError("prompt: too long", found="start " + "x" * 100_000 + " end"))

    assert len(text) < 300
    assert "found start xxx" in text
    assert "xxx end)" in text


def complain() -> None:
    raise UserError("w: bad", found="nam", fix="f", exit_code=ExitCode.BAD_DATA, choices=["name"])


def test_an_error_survives_copying_and_the_way_out_of_a_worker_process() -> None:
    with pytest.raises(UserError) as raised, ProcessPoolExecutor(1, get_context("fork")) as pool:
        pool.submit(complain).result()
    error = UserError("w: bad", found="nam", fix="f", exit_code=ExitCode.BAD_DATA, choices=["name"])

    for twin in (raised.value, copy.copy(error)):
        assert (str(twin), twin.exit_code, twin.choices) == (str(error), 4, ("name",))


def test_any_other_exception_gets_one_line_too() -> None:
    assert error_line(KeyError("lm_head\n.weight")) == "error: KeyError: 'lm_head\\n.weight'"
    assert error_line(KeyboardInterrupt()) == "error: KeyboardInterrupt"
    assert error_line(OSError("first\nsecond token=abc")) == "error: OSError: first second token=***"
