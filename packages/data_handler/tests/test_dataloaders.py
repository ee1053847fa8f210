"""From a config to batches in one call, and what earlier systems got wrong on that way."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from data_handler import (
    Batch,
    DatasetMixture,
    DomainProbeConfig,
    DomainProbeDataset,
    Shards,
    TrainingLoader,
    create_dataloader,
    create_domain_probe_loaders,
    create_mixed_dataloader,
    create_pretraining_dataloader,
)
from data_handler.config import load_data_config
from data_handler.encoder import load_encoder
from durable import UserError

LENGTH = 16


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Two sources with probes, one of them of two fields; a third has no weight and is not there."""
    for name in ("owls", "foxes"):
        lines = [json.dumps({"title": name, "text": f"number {n} in the wood"}) for n in range(300)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    path = tmp_path / "wood.yaml"
    path.write_text(
        f"""
        name: wood
        sources:
          owls: {{path: {tmp_path}/owls.jsonl, weight: 0.75, probe_one_in: 4, domain: birds,
                 text_fields: [title, text], text_separator: " # "}}
          foxes: {{path: {tmp_path}/foxes.jsonl, weight: 0.25, probe_one_in: 4, domain: mammals}}
          bees: {{path: {tmp_path}/nowhere.jsonl, weight: 0.0, probe_one_in: 4, domain: insects}}
        """
    )
    return path


def documents(shards: Shards) -> set[bytes]:
    return {shards.document(index).tobytes() for index in range(shards.num_documents)}


def test_one_call_prepares_mixes_and_holds_out(config: Path, tmp_path: Path) -> None:
    loader, mixed, probes = create_pretraining_dataloader(
        "demo", 4, LENGTH, config, data_dir=tmp_path / "out", window_samples=8
    )

    promised = len(loader)
    batches = list(loader)

    assert len(batches) == promised > 10
    assert {batch.input_ids.shape for batch in batches} == {(4, LENGTH)}
    assert all(isinstance(batch, Batch) for batch in batches)
    num_samples = 4 * len(batches)
    stats = mixed.get_sampling_stats()
    assert sum(stats.values()) == num_samples
    assert abs(stats["owls"] - 0.75 * num_samples) < 8
    assert stats["bees"] == 0
    assert probes.keys() == {"birds", "mammals"}
    for name, domain in (("owls", "birds"), ("foxes", "mammals")):
        held, trained = (Shards.open(tmp_path / "out" / name / split) for split in ("probe", "train"))
        assert documents(held) & documents(trained) == set()
        assert probes[domain].probe.shards.num_documents == held.num_documents > 0


def test_the_separator_of_the_config_is_in_the_shards(config: Path, tmp_path: Path) -> None:
    create_dataloader(config, "demo", 4, LENGTH, data_dir=tmp_path / "out")

    shards = Shards.open(tmp_path / "out" / "owls" / "train")
    text = load_encoder("demo").decode(shards.document(0).tolist())
    assert text.startswith("owls # number ")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_new_weights_reach_the_workers_and_no_sample_comes_twice(
    config: Path, tmp_path: Path, num_workers: int
) -> None:
    loader, mixed, _ = create_pretraining_dataloader(
        "demo",
        4,
        LENGTH,
        config,
        with_probes=False,
        data_dir=tmp_path / "out",
        num_samples=96,
        num_workers=num_workers,
        window_samples=16,
    )
    seen: list[tuple[int, int]] = []
    with loader:
        for number, batch in enumerate(loader):
            seen += zip(batch.sample_id.tolist(), batch.source_id.tolist(), strict=True)
            if number == 4:  # 20 samples: the window from 16 on is under way
                start = mixed.update_weights_from_influence({"owls": 0.0})

    assert start == 32
    assert [sample for sample, _ in seen] == list(range(96))
    assert sum(source == 0 for sample, source in seen if sample < 32) == 24
    assert {source for sample, source in seen if sample >= 32} == {1}


def test_ranks_share_the_samples(config: Path, tmp_path: Path) -> None:
    parts = [
        create_dataloader(config, "demo", 2, LENGTH, data_dir=tmp_path / "out", rank=rank, world_size=2)
        for rank in range(2)
    ]

    found = sorted(sample for loader in parts for batch in loader for sample in batch.sample_id.tolist())

    assert found == list(range(parts[0].num_samples))


def test_a_source_that_does_not_fill_a_batch_is_refused(config: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="blocks of 4096 tokens") as caught:
        create_dataloader(config, "demo", 4, 4096, data_dir=tmp_path / "out")

    assert caught.value.exit_code == 4


def test_sources_can_be_listed_in_code(config: Path, tmp_path: Path) -> None:
    only = DatasetMixture(name="foxes", path=str(config.parent / "foxes.jsonl"))

    loader, mixed = create_mixed_dataloader([only], "demo", 4, LENGTH, data_dir=tmp_path / "out")

    assert isinstance(loader, TrainingLoader)
    assert next(iter(loader)).source_id.tolist() == [0, 0, 0, 0]
    assert mixed.get_current_weights() == {"foxes": 1.0}


def test_a_probe_is_the_same_each_time_and_as_large_as_asked(config: Path, tmp_path: Path) -> None:
    create_dataloader(config, "demo", 4, LENGTH, data_dir=tmp_path / "out")

    probes = create_domain_probe_loaders(config, tmp_path / "out", batch_size=3, max_length=LENGTH, samples=7)

    for probe in probes.values():
        first, again = list(probe), list(probe)
        assert [len(batch) for batch in first] == [3, 3, 1]
        assert len(probe) == 3
        assert all((a.input_ids == b.input_ids).all() for a, b in zip(first, again, strict=True))


def test_a_probe_that_is_too_short_is_an_error_and_not_empty(config: Path, tmp_path: Path) -> None:
    create_dataloader(config, "demo", 4, LENGTH, data_dir=tmp_path / "out")
    path = tmp_path / "out" / "owls" / "probe"

    with pytest.raises(UserError, match="has 0 blocks of 100000 tokens"):
        DomainProbeDataset(DomainProbeConfig(path=path), max_length=100_000)


def test_probes_of_one_domain_keep_their_sources_apart(config: Path, tmp_path: Path) -> None:
    config.write_text(config.read_text().replace("domain: mammals", "domain: birds"))

    _, _, probes = create_pretraining_dataloader("demo", 4, LENGTH, config, data_dir=tmp_path / "out")

    assert probes.keys() == {"birds/owls", "birds/foxes"}


def test_the_environment_may_say_how_many_workers(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_NUM_WORKERS", "2")
    assert create_dataloader(config, "demo", 4, LENGTH, data_dir=tmp_path / "out").num_workers == 2
    assert (
        create_dataloader(config, "demo", 4, LENGTH, data_dir=tmp_path / "out", num_workers=0).num_workers
        == 0
    )

    monkeypatch.setenv("DATA_NUM_WORKERS", "many")
    with pytest.raises(UserError, match="DATA_NUM_WORKERS"):
        create_dataloader(config, "demo", 4, LENGTH, data_dir=tmp_path / "out")


RANK = """
import sys, torch.distributed
from pathlib import Path
from data_handler import create_dataloader
from durable import UserError

rank, port, config, out = int(sys.argv[1]), *sys.argv[2:]
torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
try:
    loader = create_dataloader(config, "demo", 2, 16, data_dir=Path(out), rank=rank, world_size=2)
    print(sum(batch.sample_id.sum().item() for batch in loader), loader.num_samples)
except UserError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_one_rank_prepares_and_the_others_wait_or_fail_with_it(
    config: Path, tmp_path: Path, broken: bool
) -> None:
    if broken:
        (config.parent / "foxes.jsonl").write_text("not json\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), port, str(config), str(tmp_path / "out")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]

    said = [rank.communicate(timeout=300)[0] for rank in ranks]

    if broken:
        assert all("foxes.jsonl:1" in line for line in said)
        return
    sums, counts = zip(*(map(int, line.split()) for line in said), strict=True)
    assert counts[0] == counts[1]
    assert sum(sums) == counts[0] * (counts[0] - 1) // 2


def test_what_is_there_is_not_prepared_again(config: Path, tmp_path: Path) -> None:
    create_dataloader(config, "demo", 4, LENGTH, data_dir=tmp_path / "out")
    written = (tmp_path / "out" / "owls" / "manifest.json").stat().st_mtime_ns

    create_dataloader(load_data_config(config), "demo", 4, LENGTH, data_dir=tmp_path / "out")

    assert (tmp_path / "out" / "owls" / "manifest.json").stat().st_mtime_ns == written
