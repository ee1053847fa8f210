"""The sample order is a function of (seed, sample, weight history), whoever reads it and from where."""

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_handler import workers
from data_handler.loaders import TrainingLoader
from data_handler.mixture import MixtureSchedule
from data_handler.shards import ShardHeader, Shards, finish, write_part
from data_handler.types import Batch
from durable import UserError

BLOCK = 5
WEIGHTS = {"web": 0.5, "code": 0.3, "math": 0.2, "closed": 0.0}
NUM_BLOCKS = {"web": 29, "code": 7, "math": 3}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three sources whose tokens say where they lie; the fourth has no directory."""
    root = tmp_path_factory.mktemp("sources")
    for place, (name, num_blocks) in enumerate(NUM_BLOCKS.items()):
        write_source(root / name, np.arange(num_blocks * BLOCK + 3) + 1000 * place)
    return {name: root / name for name in WEIGHTS}


def write_source(
    directory: Path, stream: np.ndarray[tuple[int], np.dtype[np.int64]], tokenizer: str = "t"
) -> None:
    directory.mkdir()
    documents = np.split(stream, np.arange(7, len(stream), 7))
    half = len(documents) // 2
    parts = [
        write_part(directory, index, part, np.dtype("<u2"))
        for index, part in enumerate((documents[:half], documents[half:]))
    ]
    header = ShardHeader(
        vocab_size=4000,
        eos_token_id=0,
        tokenizer_fingerprint=tokenizer,
        source_fingerprint="s",
        source=directory.name,
        licence="CC0-1.0",
        domain="text",
        split="train",
        parts=tuple(parts),
    )
    finish(directory, header)


def schedule(seed: int = 4) -> MixtureSchedule:
    return MixtureSchedule(WEIGHTS, seed, 16)


def loader(
    directories: dict[str, Path],
    *,
    batch_size: int = 4,
    num_samples: int = 240,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    seed: int = 4,
) -> TrainingLoader:
    return TrainingLoader(
        directories,
        schedule(seed),
        block_size=BLOCK,
        batch_size=batch_size,
        num_samples=num_samples,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
    )


def rows(batches: list[Batch]) -> list[tuple[int, ...]]:
    """(sample, source, tokens …) of every sample."""
    columns = [
        torch.column_stack([b.sample_id, b.source_id, b.input_ids, b.labels, b.document_ids]) for b in batches
    ]
    return [tuple(row) for row in torch.cat(columns).tolist()]


@given(
    world_size=st.sampled_from([1, 2, 3, 5]),
    batch_size=st.sampled_from([1, 2, 4, 8]),
    accumulation=st.sampled_from([1, 2, 3]),
)
@settings(max_examples=25, deadline=None)
def test_any_number_of_ranks_micro_batches_and_accumulation_sees_the_same_samples(
    directories: dict[str, Path], world_size: int, batch_size: int, accumulation: int
) -> None:
    whole = rows(list(loader(directories, batch_size=1)))
    ranks = [
        list(loader(directories, batch_size=batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]

    assert {len(batches) for batches in ranks} == {240 // world_size // batch_size}
    for step in range(len(ranks[0]) // accumulation):
        mine = slice(step * accumulation, (step + 1) * accumulation)
        size = world_size * batch_size * accumulation
        seen = rows([batch for batches in ranks for batch in batches[mine]])
        assert sorted(seen) == whole[step * size : (step + 1) * size]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_yield_the_same_batches(directories: dict[str, Path], num_workers: int) -> None:
    with loader(directories, num_workers=num_workers) as ours:
        assert rows(list(ours)) == rows(list(loader(directories)))


def run(ours: TrainingLoader, until: int) -> list[tuple[int, ...]]:
    """What the loader yields up to a sample, with new weights once 40 samples are out."""
    batches = []
    for batch in ours:
        batches.append(batch)
        if ours.next_sample == 40:
            ours.reweight(WEIGHTS | {"math": 0.4, "web": 0.3})
        if ours.next_sample >= until:
            break
    return rows(batches)


@given(stop=st.integers(1, 59), batch_size=st.sampled_from([1, 2, 4]))
@settings(max_examples=25, deadline=None)
def test_stopping_and_seeking_goes_on_as_if_nothing_had_happened(
    directories: dict[str, Path], stop: int, batch_size: int
) -> None:
    uninterrupted = run(loader(directories), 240)
    stopped = loader(directories)
    before = run(stopped, stop * 4)
    resumed = loader(directories, batch_size=batch_size)

    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))

    assert before + run(resumed, 240) == uninterrupted


def test_every_block_of_an_epoch_is_drawn_once_and_the_next_epoch_has_another_order(
    directories: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    ours = loader(directories, num_samples=640)
    drawn: dict[int, list[int]] = {0: [], 1: [], 2: []}

    for batch in ours:
        for source, first in zip(batch.source_id.tolist(), batch.input_ids[:, 0].tolist(), strict=True):
            drawn[source].append((first - 1000 * source) // BLOCK)

    # Inside a window samples are permuted, so epochs overlap there; their counts do not.
    for source, (name, num_blocks) in enumerate(NUM_BLOCKS.items()):
        epochs, rest = divmod(len(drawn[source]), num_blocks)
        counts = Counter(drawn[source])
        assert set(counts.values()) <= {epochs, epochs + 1}
        assert list(counts.values()).count(epochs + 1) == rest
        assert ours.epochs()[name] == epochs >= 1
        assert f"Source {name} ended: epoch 2 begins" in caplog.text
    by_index = sorted(
        (ours.schedule.locate(n)[1], n) for n in range(640) if ours.schedule.locate(n)[0] == "web"
    )
    first_blocks = {
        n: row[2] // BLOCK for n, row in enumerate(rows(list(loader(directories, num_samples=640))))
    }
    order = [first_blocks[n] for _, n in by_index]
    assert sorted(order[:29]) == sorted(order[29:58]) == list(range(29))
    assert order[:29] != order[29:58]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_new_weights_reach_the_next_window_past_what_was_prefetched(
    directories: dict[str, Path], num_workers: int
) -> None:
    before = rows(list(loader(directories)))
    expected = schedule()
    expected.reweight(35, WEIGHTS | {"web": 0.1, "code": 0.7})
    drawn = []

    with loader(directories, num_workers=num_workers) as ours:
        for number, batch in enumerate(ours):
            drawn.append(batch)
            if number == 8:  # 36 samples are out; the third window ends at 48
                assert ours.reweight(WEIGHTS | {"web": 0.1, "code": 0.7}) == 48

    got = rows(drawn)
    assert got[:48] == before[:48]
    assert [ours.schedule.names[row[1]] for row in got] == [expected.locate(n)[0] for n in range(240)]
    assert [row[0] for row in got] == list(range(240))


def test_length_counts_down_to_zero(directories: dict[str, Path]) -> None:
    ours = loader(directories, world_size=3, rank=1)

    lengths = [len(ours)] + [len(ours) for _ in ours]

    assert lengths == list(range(20, -1, -1))


@pytest.mark.parametrize("wait", [True, False])
def test_a_killed_worker_is_noticed_and_named_with_a_source(directories: dict[str, Path], wait: bool) -> None:
    with loader(directories, num_workers=2, num_samples=24_000) as ours:
        batches = iter(ours)
        next(batches)
        assert ours._pool is not None
        os.kill(ours._pool._workers[1].process.pid or 0, signal.SIGKILL)
        if wait:
            time.sleep(0.3)
        begun = time.monotonic()
        with pytest.raises(
            UserError, match=r"data\.sources\.(web|code|math): the worker .* SIGKILL"
        ) as caught:
            for _ in batches:
                pass

    assert caught.value.exit_code == 4
    assert time.monotonic() - begun < 30  # the bound that the fault list gives


def test_a_stopped_worker_is_noticed_and_named_with_a_source(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert workers.ANSWER_SECONDS < 30  # the bound that the fault list gives
    monkeypatch.setattr(workers, "ANSWER_SECONDS", 2)
    with loader(directories, num_workers=2, num_samples=24_000) as ours:
        batches = iter(ours)
        next(batches)
        assert ours._pool is not None
        stopped = ours._pool._workers[1].process
        os.kill(stopped.pid or 0, signal.SIGSTOP)
        with pytest.raises(
            UserError, match=r"data\.sources\.(web|code|math): the worker .* gives no answer .*stopped"
        ) as caught:
            list(batches)
        stopped.join(timeout=10)
        assert not stopped.is_alive()  # or an interpreter that closes nothing would wait for it at its end

    assert caught.value.exit_code == 4


def test_a_worker_that_hangs_in_a_source_is_named_with_that_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "ANSWER_SECONDS", 2)
    write_source(tmp_path / "web", np.arange(40))
    with TrainingLoader(
        {"web": tmp_path / "web"},
        MixtureSchedule({"web": 1.0}, 0),
        block_size=5,
        batch_size=1,
        num_samples=4,
        num_workers=1,
    ) as ours:
        (tmp_path / "web" / "shards.json").unlink()
        os.mkfifo(tmp_path / "web" / "shards.json")  # the worker's open waits for a writer
        with pytest.raises(UserError, match=r"data\.sources\.web: the worker reading it gives no answer"):
            next(iter(ours))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_shrinks_under_the_loader_is_one_line(tmp_path: Path, num_workers: int) -> None:
    write_source(tmp_path / "web", np.arange(5000) % 4000)
    with TrainingLoader(
        {"web": tmp_path / "web"},
        MixtureSchedule({"web": 1.0}, 0),
        block_size=50,
        batch_size=3,
        num_samples=30_000,
        num_workers=num_workers,
    ) as ours:
        batches = iter(ours)
        next(batches)
        with (tmp_path / "web" / "tokens-00001.bin").open("r+b") as file:
            file.truncate(100)
        with pytest.raises(UserError, match=r"tokens-00001.bin: shrank") as caught:
            list(batches)

    assert caught.value.exit_code == 4


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_flipped_bit_that_makes_no_token_is_one_line(tmp_path: Path, num_workers: int) -> None:
    write_source(tmp_path / "web", np.arange(4000))
    write_source(tmp_path / "code", np.arange(4000))
    stored = np.fromfile(tmp_path / "code" / "tokens-00001.bin", "<u2")
    stored[700] ^= 1 << 15
    stored.tofile(tmp_path / "code" / "tokens-00001.bin")
    with (
        TrainingLoader(
            {name: tmp_path / name for name in ("web", "code")},
            MixtureSchedule({"web": 0.5, "code": 0.5}, 0, 16),
            block_size=50,
            batch_size=2,
            num_samples=160,
            num_workers=num_workers,
        ) as ours,
        pytest.raises(UserError, match=r"code/tokens-00001\.bin: is damaged.*at place 700") as caught,
    ):
        list(ours)

    assert caught.value.exit_code == 4


def test_a_source_with_less_than_a_block_is_named(tmp_path: Path) -> None:
    write_source(tmp_path / "web", np.arange(40))

    with pytest.raises(UserError, match=r"data\.sources\.web: has less than one block of 41") as caught:
        TrainingLoader(
            {"web": tmp_path / "web"},
            MixtureSchedule({"web": 1.0}, 0),
            block_size=41,
            batch_size=1,
            num_samples=1,
        )

    assert caught.value.exit_code == 4


def test_sources_of_two_tokenizers_are_refused(tmp_path: Path) -> None:
    write_source(tmp_path / "web", np.arange(40))
    write_source(tmp_path / "code", np.arange(40), tokenizer="u")
    directories = {name: tmp_path / name for name in ("web", "code")}

    with pytest.raises(UserError, match="another tokenizer"):
        TrainingLoader(
            directories,
            MixtureSchedule({"web": 0.5, "code": 0.5}, 0),
            block_size=4,
            batch_size=1,
            num_samples=1,
        )


def test_samples_that_do_not_divide_are_refused_and_so_is_another_order(directories: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="multiple of 12"):
        loader(directories, num_samples=241, world_size=3)
    with pytest.raises(UserError, match="seed"):
        loader(directories, seed=5).load_state_dict(loader(directories).state_dict())
    with pytest.raises(UserError, match="block_size"):
        loader(directories).load_state_dict(loader(directories).state_dict() | {"block_size": 6})


def test_a_source_without_weight_is_never_opened(directories: dict[str, Path]) -> None:
    assert not directories["closed"].exists()

    assert len(list(loader(directories))) == 60
    with pytest.raises(UserError, match="closed"):
        Shards.open(directories["closed"])
