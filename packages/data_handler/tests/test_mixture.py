"""The order of a mixture, by property; counts are checked against apportionment done with fractions here."""

import json
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_handler.mixture import MixtureSchedule
from data_handler.permutation import permuted
from durable import UserError

settings.register_profile("shared machine", deadline=None, max_examples=40)
settings.load_profile("shared machine")

WINDOWS = st.integers(8, 40)
# 0, or a weight that is worth a sample in the smallest window even beside seven of the largest.
WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(1.0, 1.1)), min_size=1, max_size=6).filter(any)


def named(weights: list[float]) -> dict[str, float]:
    return {f"source{place}": weight for place, weight in enumerate(weights)}


def samples(schedule: MixtureSchedule, windows: int) -> list[tuple[int, int]]:
    """(source, index) of the first samples."""
    parts = [np.stack(schedule.window(number), 1) for number in range(windows)]
    return [(source, index) for source, index in np.concatenate(parts).tolist()]


def hamilton(weights: list[float], num_samples: int) -> list[int]:
    """The largest remainder of n·w, as in any textbook."""
    exact = [Fraction(repr(weight)) for weight in weights]
    quotas = [weight * num_samples / sum(exact) for weight in exact]
    counts = [int(quota) for quota in quotas]
    order = sorted(range(len(quotas)), key=lambda place: (-(quotas[place] - counts[place]), place))
    for place in order[: num_samples - sum(counts)]:
        counts[place] += 1
    return counts


@given(WEIGHTS, st.integers(0, 5), WINDOWS, st.integers(0, 10**9))
def test_counts_at_window_ends_are_the_largest_remainder(
    weights: list[float], seed: int, window: int, number: int
) -> None:
    schedule = MixtureSchedule(named(weights), seed, window)

    counts = list(schedule.counts(number * window).values())

    assert counts == hamilton(weights, number * window)


@given(WEIGHTS, st.integers(0, 5), WINDOWS)
def test_every_sample_of_a_source_is_drawn_once_in_order_of_windows(
    weights: list[float], seed: int, window: int
) -> None:
    schedule = MixtureSchedule(named(weights), seed, window)
    drawn: dict[str, list[int]] = {name: [] for name in schedule.names}

    for place, index in samples(schedule, 5):
        drawn[schedule.names[place]].append(index)

    assert {name: sorted(indices) for name, indices in drawn.items()} == {
        name: list(range(count)) for name, count in schedule.counts(5 * window).items()
    }
    assert all(not drawn[name] for name, weight in named(weights).items() if weight == 0)


@given(WEIGHTS, WINDOWS, st.integers(0, 10**12))
def test_a_whole_window_is_its_samples_one_by_one(weights: list[float], window: int, number: int) -> None:
    schedule = MixtureSchedule(named(weights), 7, window)

    source, index = schedule.window(number)

    assert [(schedule.names[s], i) for s, i in zip(source, index, strict=True)] == [
        schedule.locate(number * window + place) for place in range(window)
    ]


@given(WEIGHTS, st.lists(st.tuples(st.integers(0, 90), st.integers(0, 99)), max_size=5), WINDOWS)
def test_new_weights_change_nothing_before_the_next_window(
    weights: list[float], changes: list[tuple[int, int]], window: int
) -> None:
    schedule = MixtureSchedule(named(weights), 3, window)
    for sample, turn in sorted(changes):
        before = samples(schedule, sample // window + 1)
        rotated = weights[turn % len(weights) :] + weights[: turn % len(weights)]

        start = schedule.reweight(sample, named(rotated))

        assert start == len(before)
        assert samples(schedule, start // window) == before


@given(
    st.lists(st.lists(st.floats(1.0, 1.1), min_size=4, max_size=4), min_size=2, max_size=9),
    st.lists(st.integers(0, 3), min_size=9, max_size=9),
    WINDOWS,
)
def test_counts_stay_within_one_of_the_sum_of_all_weights_that_ever_held(
    history: list[list[float]], lengths: list[int], window: int
) -> None:
    schedule, worth, sample = MixtureSchedule(named(history[0]), 3, window), [Fraction(0)] * 4, 0
    for weights, length in zip(history, lengths, strict=False):
        if sample:
            assert schedule.reweight(sample - 1, named(weights)) == sample
        before = schedule.counts(sample)
        sample += (length + 1) * window
        total = sum(map(Fraction, weights))
        worth = [
            sum_ + (length + 1) * window * Fraction(w) / total for sum_, w in zip(worth, weights, strict=True)
        ]
        counts = schedule.counts(sample)
        # 2^-60: the carry is rounded to 2^-64 at each change, weights are read as decimals.
        assert all(abs(c - w) < 1 + 2**-40 for c, w in zip(counts.values(), worth, strict=True))
        assert all(counts[name] >= before[name] for name in before)
        assert sum(counts.values()) == sample


def test_a_source_that_is_closed_is_never_drawn_and_one_that_is_opened_goes_on_where_it_was() -> None:
    schedule = MixtureSchedule({"a": 0.55, "b": 0.45, "c": 0.0}, 1, 16)
    schedule.reweight(20, {"a": 0.7, "b": 0.0, "c": 0.3})
    schedule.reweight(50, {"a": 0.3, "b": 0.4, "c": 0.3})

    drawn = [schedule.locate(n) for n in range(208)]

    assert {source for source, _ in drawn[:32]} == {"a", "b"}
    assert {source for source, _ in drawn[32:64]} == {"a", "c"}
    assert len(set(drawn)) == 208
    for name, count in Counter(source for source, _ in drawn).items():
        assert {index for source, index in drawn if source == name} == set(range(count))


def test_the_state_of_a_schedule_survives_json() -> None:
    schedule = MixtureSchedule({"a": 0.6, "b": 0.1, "c": 0.3}, 1, 16)
    for sample in (3, 17, 18, 90):
        schedule.reweight(sample, {"a": 0.3, "b": 0.1 + sample / 300, "c": 0.6})
    resumed = MixtureSchedule({"a": 0.6, "b": 0.1, "c": 0.3}, 1, 16)

    resumed.load_state_dict(json.loads(json.dumps(schedule.state_dict())))

    assert [resumed.locate(n) for n in range(300)] == [schedule.locate(n) for n in range(300)]
    assert resumed.state_dict() == schedule.state_dict()


@pytest.mark.parametrize(
    ("seed", "window", "names", "key"),
    [(2, 16, "abc", "seed"), (1, 8, "abc", "window"), (1, 16, "ab", "sources")],
)
def test_the_state_of_another_run_is_refused(seed: int, window: int, names: str, key: str) -> None:
    state = MixtureSchedule(dict.fromkeys(names, 1.0), seed, window).state_dict()

    with pytest.raises(UserError, match=key) as caught:
        MixtureSchedule(dict.fromkeys("abc", 1.0), 1, 16).load_state_dict(state)

    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "history", [None, [], [[3, {"a": 1.0}]], [[0, {"a": 1.0}], [0, {"a": 1.0}]], [[0, 5]]]
)
def test_a_history_that_is_none_is_bad_data(history: object) -> None:
    with pytest.raises(UserError) as caught:
        MixtureSchedule({"a": 1.0}, 1, 16).load_state_dict(
            {"seed": 1, "window_samples": 16, "history": history}
        )

    assert caught.value.exit_code == 4


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), "0.5", True, None, 1e-300, 1 / 17])
def test_a_weight_that_cannot_be_is_refused_with_its_source(weight: float) -> None:
    with pytest.raises(UserError, match="code") as caught:
        MixtureSchedule({"web": 0.9, "code": weight}, 0, 16)

    assert caught.value.exit_code == 2


def test_refused_weights_leave_the_old_ones_in_force() -> None:
    schedule = MixtureSchedule({"a": 0.5, "b": 0.5}, 0, 16)
    schedule.reweight(5, {"a": 0.25, "b": 0.75})

    with pytest.raises(UserError):
        schedule.reweight(6, {"a": 0.0, "b": 0.0})

    assert schedule.weights(15) == {"a": 0.5, "b": 0.5}
    assert schedule.weights(16) == {"a": 0.25, "b": 0.75}


def test_weights_that_do_not_add_up_are_taken_in_proportion_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    schedule = MixtureSchedule({"a": 3.0, "b": 1.0}, 0, 16)

    assert schedule.counts(16) == {"a": 12, "b": 4}
    assert "add up to 4" in caplog.text


def test_another_seed_is_another_order_and_windows_differ() -> None:
    orders = [
        tuple(MixtureSchedule({"a": 0.5, "b": 0.5}, seed, 64).window(window)[0])
        for seed in (0, 1)
        for window in (0, 1, 10**9)
    ]

    assert len(set(orders)) == 6


@given(st.integers(1, 400), st.integers(0, 2**64 - 1))
def test_a_permutation_reaches_every_value_once(size: int, key: int) -> None:
    values = permuted(np.arange(size), size, key)

    assert sorted(values.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 17, 1000, 2**62])
def test_a_few_places_are_sent_where_many_are(size: int) -> None:
    places = np.linspace(0, size - 1, 40).astype(np.int64) if size < 2**60 else np.arange(2**61, 2**61 + 40)

    together = permuted(places, size, 3)

    assert [permuted(places[i : i + 1], size, 3)[0] for i in range(40)] == together.tolist()


def test_a_permutation_of_2_to_the_62_places_stays_inside() -> None:
    places = np.array([0, 1, 2**61, 2**62 - 1])

    values = permuted(places, 2**62, 9)

    assert len(set(values.tolist())) == 4
    assert ((values >= 0) & (values < 2**62)).all()


def test_neighbours_are_sent_far_apart() -> None:
    values = permuted(np.arange(10_000), 10_000, 5)
    steps = [abs(low - high) for low, high in pairwise(values.tolist())]

    # Two random places of n are n/3 apart on average, with a deviation of n/√18 per pair: six of them.
    assert abs(np.mean(steps) - 10_000 / 3) < 6 * 10_000 / 18**0.5 / 100


def test_the_order_is_the_same_on_every_machine() -> None:
    assert [MixtureSchedule({"a": 0.6, "b": 0.4}, 5, 8).locate(10**9 + place) for place in range(3)] == [
        ("b", 400_000_000),
        ("a", 600_000_004),
        ("a", 600_000_002),
    ]
