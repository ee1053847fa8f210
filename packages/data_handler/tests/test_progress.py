"""The clock is given, so that what is expected can be worked out by hand."""

import io
import re
from contextlib import redirect_stderr
from typing import Any

import pytest

from data_handler.progress import Pace, Work, describe, progress_bar


def pace(*, tokens: int, size: int, **work: Any) -> Pace:
    made = Pace(Work(source="s", **work), now=100.0)
    made.tokens += tokens
    made.size += size
    return made


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        # A quarter of the budget in ten seconds leaves three times as long.
        ({"max_tokens": 2_000, "num_bytes": 0}, " 25%  500 tokens, 50 tokens/s, 0:30 left"),
        # Half of the bytes, whichever is nearer its end.
        ({"max_tokens": 2_000, "num_bytes": 6_000}, " 50%  500 tokens, 50 tokens/s, 0:10 left"),
        ({"max_tokens": None, "num_bytes": 12_000}, " 25%  500 tokens, 50 tokens/s, 0:30 left"),
        ({"max_tokens": None, "num_bytes": 1_000 * 3_000}, "  0%  500 tokens, 50 tokens/s, 2:46:30 left"),
        # A stream of unknown length: nobody knows.
        ({"max_tokens": None, "num_bytes": 0}, "500 tokens, 50 tokens/s"),
    ],
)
def test_share_speed_and_time_left(work: dict[str, Any], expected: str) -> None:
    assert describe(pace(tokens=500, size=3_000, **work), now=110.0) == expected


def test_what_an_earlier_run_did_counts_as_done_and_not_as_fast() -> None:
    made = pace(
        tokens=500, size=1_000, max_tokens=None, num_bytes=10_000, tokens_there=4_000, bytes_there=8_000
    )

    # 8,000 were there; of the other 2,000 half took ten seconds.
    assert describe(made, now=110.0) == " 90%  4,500 tokens, 50 tokens/s, 0:10 left"


def test_the_bar_says_it() -> None:
    with (
        redirect_stderr(io.StringIO()) as said,
        progress_bar(Work(source="stories", max_tokens=1_000, num_bytes=0)) as advance,
    ):
        advance(600, 10)
        advance(400, 10)

    assert re.search(
        r"stories .*100%\s+1,000\s+tokens,\s+[\d,]+\s+tokens/s", " ".join(said.getvalue().split())
    )
