"""The command lines of earlier documents: the table in docs/configuration_guide.md is read, each row is run.

A row runs as it is written, for two steps. What it would download is put in place below the configuration:
a tiny model under every name, one local file under every source, memory under every `gs://` bucket.
"""

import dataclasses
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from bitnet_arch.testing import tiny_llama
from data_handler.config import DataConfig, SourceFormat, load_data_config
from wrinklefree.config import load_config
from wrinklefree.pretrained import Pretrained
from wrinklefree.run import RunResult, run
from wrinklefree.runs import read_metrics

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configuration_guide.md"
ROW = re.compile(r"^\| `(?P<command>[^`]*scripts/train[^`]*)` \| (?P<source>[^|]*) \| (?P<here>.*) \|$", re.M)
SMALLER = [
    "model.tokenizer=demo",
    "training.max_seq_length=32",
    "training.batch_size=1",
    "training.gradient_accumulation_steps=2",
    "training.validation.num_batches=1",
    "training.validation.batch_size=1",
]
QUICK = "training=base"


class Buckets(MemoryFileSystem):  # type: ignore[misc]
    """`gs://` in memory."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.removeprefix("gs:/"))
        return stripped


@dataclass(frozen=True)
class Command:
    """A row of the table."""

    script: str
    environment: dict[str, str]
    overrides: list[str]

    def __str__(self) -> str:
        return " ".join(self.overrides)


def parsed(row: re.Match[str]) -> Command:
    words = shlex.split(row["command"])
    place = next(number for number, word in enumerate(words) if word.endswith(".py"))
    environment = dict(word.split("=", 1) for word in words[:place] if "=" in word)
    return Command(words[place], environment, words[place + 1 :])


COMMANDS = [parsed(row) for row in ROW.finditer(PAGE.read_text())]


@pytest.fixture(scope="module", autouse=True)
def _everything_is_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    documents = tmp_path_factory.mktemp("documents") / "all.jsonl"
    words = ["ternary", "weights", "are", "one", "of", "three"]
    lines = [json.dumps({"text": " ".join(words[n % 6 :] + words[: n % 6]) + f" {n}"}) for n in range(600)]
    documents.write_text("\n".join(lines))

    def local(name: str) -> DataConfig:
        config = load_data_config(name)
        sources = {
            name: dataclasses.replace(
                source,
                path=str(documents),
                format=SourceFormat.JSONL,
                subset=None,
                text_fields=("text",),
                messages_field=None,
                answers_only=False,
                probe_one_in=5,
            )
            for name, source in config.sources.items()
        }
        return dataclasses.replace(config, sources=sources)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WRINKLEFREE_DATA", str(tmp_path_factory.mktemp("data")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("RESUME_CHECKPOINT", raising=False)
        patch.setattr("wrinklefree.training.data.load_data_config", local)
        patch.setattr(
            "wrinklefree.training.student.load_pretrained",
            lambda name: Pretrained(tiny_llama(), tokenizer=None, source=name),
        )
        patch.setitem(importlib.import_module("fsspec.registry")._registry, "gs", Buckets)
        yield


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> None:
    """`gs://bucket` holds a checkpoint of a run."""
    result = started(["training=unified"], tmp_path_factory.mktemp("first"), steps=1)
    fsspec.filesystem("memory").put(f"{result.directory}/checkpoints/final/", "/bucket/", recursive=True)


def started(overrides: list[str], output_dir: Path, *, steps: int | None = 2) -> RunResult:
    length = [] if steps is None else [f"training.max_steps={steps}"]
    return run(load_config([*overrides, *SMALLER, *length, f"training.output_dir={output_dir}"]))


def test_the_table_is_there_and_names_scripts_and_presets_that_exist() -> None:
    assert len(COMMANDS) >= 25
    assert {"unified", "base", "stage1_subln", "stage2_pretrain"} <= {
        word.partition("=")[2] for command in COMMANDS for word in command.overrides
    }
    assert all((ROOT / command.script).is_file() for command in COMMANDS)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, id=str(command), marks=[] if QUICK in command.overrides else pytest.mark.slow)
        for command in COMMANDS
    ],
)
def test_a_command_line_of_earlier_documents_starts(
    command: Command, bucket: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in command.environment.items():
        monkeypatch.setenv(name, value)
    is_conversion = "training=stage1_subln" in command.overrides
    result = started(command.overrides, tmp_path, steps=None if is_conversion else 2)

    is_continued = "gs://bucket/checkpoint.pt" in f"{command.environment} {command.overrides}"
    steps = [] if is_conversion else [2] if is_continued else [1, 2]
    assert result.exit_code == 0
    assert [row["step"] for row in read_metrics(result.directory / "metrics.jsonl")] == steps
    assert (result.directory / "checkpoints" / "final" / "model.safetensors").is_file()
    if "gcs.enabled=true" in command.overrides:
        places = fsspec.filesystem("memory").find("/wrinklefree-checkpoints")
        assert any(place.endswith("checkpoints/final/manifest.json") for place in places)
