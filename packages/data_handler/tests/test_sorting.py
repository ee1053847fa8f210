"""The sorting task is a pure function of (seed, index); answers are checked with Python's own `sorted`."""

import pytest
import torch

from data_handler.sorting import (
    HELD_OUT,
    IGNORED_LABEL,
    NUM_SAMPLES,
    PROMPT_LENGTH,
    decode,
    encode,
    sorting_batch,
)


def test_the_answer_is_the_question_sorted() -> None:
    batch = sorting_batch(seed=3, first_index=70, count=50)

    for row in batch.input_ids.tolist():
        question, answer = decode(row).split(">")
        assert len(question) == 8
        assert answer == "".join(sorted(question)) + "\n"


def test_loss_is_asked_for_the_answer_and_its_end_only() -> None:
    batch = sorting_batch(seed=3, first_index=0, count=5)

    assert (batch.labels[:, :PROMPT_LENGTH] == IGNORED_LABEL).all()
    assert torch.equal(batch.labels[:, PROMPT_LENGTH:], batch.input_ids[:, PROMPT_LENGTH:])
    assert batch.labels.shape == (5, 18)


def test_a_sample_does_not_depend_on_the_batch_it_came_in() -> None:
    whole = sorting_batch(seed=11, first_index=1000, count=64)
    parts = [
        sorting_batch(seed=11, first_index=first, count=count)
        for first, count in ((1000, 7), (1007, 56), (1063, 1))
    ]

    assert torch.equal(whole.input_ids, torch.cat([part.input_ids for part in parts]))
    assert torch.equal(whole.sample_id, torch.arange(1000, 1064))


def test_no_question_occurs_twice_so_held_out_ones_are_new() -> None:
    seen = sorting_batch(seed=5, first_index=0, count=100_000).input_ids[:, :8]
    fresh = sorting_batch(seed=5, first_index=HELD_OUT, count=100_000).input_ids[:, :8]

    numbers = (torch.cat([seen, fresh]) * 10 ** torch.arange(7, -1, -1)).sum(-1)

    # Drawn with repetition, 200,000 of 10^8 would collide about 200 times.
    assert len(set(numbers.tolist())) == 200_000


def test_every_digit_is_as_frequent_as_the_others_in_every_place() -> None:
    digits = sorting_batch(seed=2, first_index=0, count=100_000).input_ids[:, :8]

    counts = torch.stack([(digits == digit).float().mean(0) for digit in range(10)])

    # Six standard deviations of a binomial share: 6 · sqrt(0.09 / 100,000).
    assert (counts - 0.1).abs().max() < 0.0057


def test_another_seed_is_another_order() -> None:
    assert not torch.equal(sorting_batch(0, 0, 20).input_ids, sorting_batch(1, 0, 20).input_ids)


def test_the_stream_is_the_same_on_every_machine() -> None:
    assert (
        decode(sorting_batch(0, 0, 2).input_ids.flatten().tolist())
        == "10098236>00123689\n33718789>13377889\n"
    )


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()

    sorting_batch(0, 0, 4)

    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (0, 0), (NUM_SAMPLES - 1, 2)])
def test_an_index_outside_the_stream_is_refused(first: int, count: int) -> None:
    with pytest.raises(ValueError, match="samples 0"):
        sorting_batch(0, first, count)


def test_text_survives_the_round_trip_and_foreign_characters_are_named() -> None:
    assert decode(encode("042>024\n")) == "042>024\n"
    with pytest.raises(ValueError, match="'x'"):
        encode("4x")
