"""What commands print, against text written by hand."""

import pytest

from wrinklefree.terminal import curve, megabytes, table


def test_columns_are_aligned_and_numbers_stand_to_the_right() -> None:
    text = table([("a", "5"), ("long name", "1,024")], header=("part", "bytes"), indent=1)

    assert text.splitlines() == [
        " part       bytes",
        " ─────────  ─────",
        " a              5",
        " long name  1,024",
    ]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (13_400, "13.4 kB"), (2e9, "2 GB"), (730_000_000, "730 MB")],
)
def test_sizes_have_three_digits_and_a_unit(num_bytes: float, text: str) -> None:
    assert megabytes(num_bytes) == text


def test_a_falling_curve_falls_from_the_first_line_to_the_last() -> None:
    lines = curve([8.0, 4.0, 2.0, 1.0], height=4).splitlines()

    # 32 eighths: 32, 21.7, 11.3 and 1 of them.
    assert [line.partition("│")[2] for line in lines[:4]] == ["█", "█▆", "██▃", "███▁"]
    assert lines[0].startswith("       8 │")
    assert lines[3].startswith("       1 │")
    assert lines[4].endswith("└──── 4 steps")


def test_a_flat_curve_and_a_single_value_are_drawn() -> None:
    assert curve([3.0] * 7).count("▁") == 7
    assert curve([3.0]).count("▁") == 1


def test_many_values_become_as_many_columns_as_there_is_room() -> None:
    assert curve([float(value) for value in range(1, 1001)], width=10).splitlines()[-1].count("─") == 10
