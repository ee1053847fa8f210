"""A mixture read without preparing it: shares, order, ranks and what earlier systems got wrong."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from data_handler import DatasetMixture, MixedDataset, create_mixed_dataset
from durable import UserError

WEIGHTS = {"owls": 0.5, "foxes": 0.3, "bees": 0.2}


def mixtures(directory: Path, *, count: int = 400) -> list[DatasetMixture]:
    found = []
    for name, weight in WEIGHTS.items():
        path = directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name} {n}"}) + "\n" for n in range(count)))
        found.append(DatasetMixture(name=name, path=str(path), weight=weight))
    return found


def drawn(mixed: MixedDataset, count: int) -> list[tuple[str, str]]:
    return [(item["source"], item["text"]) for item in islice(mixed, count)]


def test_every_source_gets_its_share_in_its_own_order(tmp_path: Path) -> None:
    mixed = MixedDataset(mixtures(tmp_path), window_samples=20)

    found = drawn(mixed, 200)

    assert Counter(source for source, _ in found) == {"owls": 100, "foxes": 60, "bees": 40}
    for name in WEIGHTS:
        texts = [text for source, text in found if source == name]
        assert texts == [f"{name} {n}" for n in range(len(texts))]
    assert mixed.get_sampling_stats() == {"owls": 100, "foxes": 60, "bees": 40}
    assert mixed.get_current_weights() == pytest.approx(WEIGHTS)


def test_another_seed_is_another_order(tmp_path: Path) -> None:
    first, again, other = (MixedDataset(mixtures(tmp_path), seed) for seed in (1, 1, 2))

    assert drawn(first, 100) == drawn(again, 100)
    assert drawn(first, 100) != drawn(other, 100)


def test_ranks_share_the_stream_and_none_sees_anothers_documents(tmp_path: Path) -> None:
    alone = drawn(MixedDataset(mixtures(tmp_path)), 90)

    ranks = [drawn(MixedDataset(mixtures(tmp_path), rank=rank, world_size=3), 30) for rank in range(3)]

    assert [item for step in zip(*ranks, strict=True) for item in step] == alone


def test_a_source_that_ends_begins_again(tmp_path: Path) -> None:
    mixed = MixedDataset(mixtures(tmp_path, count=7)[:1])

    assert [text for _, text in drawn(mixed, 16)] == [f"owls {n % 7}" for n in range(16)]


def test_new_weights_begin_with_the_next_window_on_every_rank(tmp_path: Path) -> None:
    parts = []
    for rank in range(2):
        mixed = MixedDataset(mixtures(tmp_path), rank=rank, world_size=2, window_samples=20)
        stream, sources = iter(mixed), []
        for step in range(40):
            if step == 10:  # both ranks have had samples 0 to 19
                start = mixed.update_weights_from_influence({"bees": 0.0})
            sources.append(next(stream)["source"])
        assert start == 20
        assert mixed.get_current_weights() == pytest.approx({"owls": 0.625, "foxes": 0.375, "bees": 0.0})
        parts.append(sources)

    both = [source for step in zip(*parts, strict=True) for source in step]
    assert Counter(both[:20]) == {"owls": 10, "foxes": 6, "bees": 4}
    assert Counter(both[20:60]) == {"owls": 25, "foxes": 15}


def test_ranks_agree_on_the_window_where_a_step_crosses_its_end(tmp_path: Path) -> None:
    starts = []
    for rank in range(2):
        mixed = MixedDataset(mixtures(tmp_path), rank=rank, world_size=2, window_samples=5)
        drawn(mixed, 3)  # samples 0, 2, 4 on one rank and 1, 3, 5 on the other
        starts.append(mixed.update_weights_from_influence({"owls": 0.2}))

    assert starts == [10, 10]


def test_weights_for_a_source_that_is_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'owls'"):
        MixedDataset(mixtures(tmp_path)).update_weights_from_influence({"owl": 1.0})


def test_a_source_without_weight_is_never_opened(tmp_path: Path) -> None:
    missing = DatasetMixture(name="missing", path=str(tmp_path / "nowhere.jsonl"), weight=0.0)

    assert len(drawn(MixedDataset([*mixtures(tmp_path), missing]), 50)) == 50


@pytest.mark.parametrize("from_yaml", [False, True])
def test_columns_are_joined_by_the_separator_that_was_asked_for(tmp_path: Path, from_yaml: bool) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text('{"q": "who?", "a": "the owl"}\n')
    in_code = DatasetMixture(name="qa", path=str(path), text_column=["q", "a"], text_separator=" | ")
    (tmp_path / "c.yaml").write_text(
        f"name: c\nsources: {{qa: {{path: {path}, text_fields: [q, a], text_separator: ' | '}}}}"
    )

    mixed = create_mixed_dataset(tmp_path / "c.yaml" if from_yaml else [in_code])

    assert drawn(mixed, 1) == [("qa", "who? | the owl")]


def test_a_missing_column_is_named_with_its_line_and_nothing_else_is_taken_for_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"content": "other"}\n')

    with pytest.raises(UserError, match=r"a\.jsonl:2: .*'text' is missing") as caught:
        drawn(MixedDataset([DatasetMixture(name="a", path=str(path))]), 2)

    assert caught.value.exit_code == 4


def test_torch_workers_are_refused_as_they_would_repeat_documents_and_miss_new_weights(
    tmp_path: Path,
) -> None:
    loader = DataLoader(MixedDataset(mixtures(tmp_path)), batch_size=None, num_workers=1)

    with pytest.raises(ValueError, match="num_workers"):
        next(iter(loader))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": float("nan")}, r"data: sources\.owls\.weight"),
        ({"weight": -1.0}, r"data: sources\.owls\.weight"),
        ({"text_column": []}, r"data: sources\.owls\.text_fields"),
        ({"name": "../owls"}, "a source has a name"),
    ],
)
def test_what_makes_no_sense_is_refused_like_in_yaml(change: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {"name": "owls", "path": "owls.jsonl"} | change

    with pytest.raises(UserError, match=message):
        MixedDataset([DatasetMixture(**settings)])  # type: ignore[arg-type]


def test_two_sources_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="two sources have one name"):
        MixedDataset([DatasetMixture(name="a", path="a"), DatasetMixture(name="a", path="b")])
