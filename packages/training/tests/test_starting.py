"""Where a run starts: at an address, at the variable, at an earlier stage; and what it then takes over."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from bitnet_arch.testing import tiny_llama
from data_handler.demo import TOKENIZER_DIR
from durable import UserError, publish
from wrinklefree.config import load_config
from wrinklefree.objectives import DiffusionConfig
from wrinklefree.run import RunResult, run
from wrinklefree.runs import read_metrics
from wrinklefree.training.run_directory import find_checkpoint, step_of
from wrinklefree.training.student import check_teacher, load_tokenizer, prepare_mask

SMALL = [
    "experiment=quick",
    "training.influence.enabled=false",
    "training.validation.num_batches=0",
    "training.max_seq_length=32",
    "training.max_steps=4",
    "training.checkpoint.save_interval=2",
    "training.logging.log_interval=100",
]
FRESH = [f"training.resume.load_{what}_state=false" for what in ("optimizer", "scheduler", "training")]


@pytest.fixture(scope="module", autouse=True)
def _own_places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("RESUME_CHECKPOINT", raising=False)
        yield


def train(output_dir: Path, *overrides: str) -> RunResult:
    return run(load_config([*SMALL, f"output_dir={output_dir}", *overrides]))


def rows(result: RunResult) -> list[dict[str, object]]:
    return read_metrics(result.directory / "metrics.jsonl")


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def address(whole: RunResult) -> str:
    """The run, copied to a filesystem that is not this disk."""
    filesystem = fsspec.filesystem("memory")
    filesystem.put(f"{whole.directory}/", "/bucket/quick/base_checkpoint/", recursive=True)
    return "memory://bucket/quick/base_checkpoint"


def test_a_run_starts_from_an_address_as_from_this_disk(
    whole: RunResult, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESUME_CHECKPOINT", f"{address}/checkpoints/step_2/checkpoint.pt")

    result = train(tmp_path)

    assert [row["loss"] for row in rows(result)] == [row["loss"] for row in rows(whole)][2:]


def test_the_configuration_comes_before_the_variable_and_an_own_checkpoint_before_both(
    whole: RunResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RESUME_CHECKPOINT", str(tmp_path / "nowhere"))
    step_2 = whole.directory / "checkpoints" / "step_000002"

    first = train(tmp_path, f"training.resume.checkpoint_path={step_2}", "training.max_steps=3")
    assert f"starting at step 2 from {step_2}" in capsys.readouterr().out
    train(tmp_path, "training.max_steps=4")  # the run that exists does not look for `nowhere`

    assert [row["step"] for row in rows(first)] == [3, 4]


def test_a_variable_that_leads_nowhere_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESUME_CHECKPOINT", str(tmp_path / "nowhere"))

    with pytest.raises(UserError, match=r"^RESUME_CHECKPOINT: no such directory") as caught:
        train(tmp_path)

    assert caught.value.exit_code == 4


@pytest.fixture
def remote(tmp_path: Path) -> str:
    """Checkpoints of steps 5 and 10 at an address."""
    for step in (5, 10):
        with publish(tmp_path / f"step_{step:06d}", metadata={"step": step}) as directory:
            (directory / "model.safetensors").write_bytes(bytes([step]) * 1000)
    root = f"/{tmp_path.name}"
    filesystem = fsspec.filesystem("memory")
    filesystem.put(f"{tmp_path}/", f"{root}/checkpoints/", recursive=True)
    return f"memory:/{root}"


@pytest.mark.parametrize(
    "end", ["", "/checkpoints", "/checkpoints/step_10", "/checkpoints/step_10/checkpoint.pt"]
)
def test_an_address_may_name_a_checkpoint_or_what_it_lies_in(end: str, remote: str) -> None:
    found = find_checkpoint(remote + end)

    assert step_of(found) == 10
    assert (found / "model.safetensors").read_bytes() == bytes([10]) * 1000


def test_what_changed_at_its_address_is_copied_again(remote: str, tmp_path: Path) -> None:
    find_checkpoint(f"{remote}/checkpoints/step_5")
    with publish(tmp_path / "step_000005", replace=True, metadata={"step": 5}) as directory:
        (directory / "model.safetensors").write_bytes(b"new")
    fsspec.filesystem("memory").put(
        f"{tmp_path}/step_000005/", f"{remote[8:]}/checkpoints/step_000005/", recursive=True
    )

    found = find_checkpoint(f"{remote}/checkpoints/step_5")

    assert (found / "model.safetensors").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors", bytes([11]) * 1000, "model.safetensors is not what its manifest says"),
        ("manifest.json", b'{"files": [', "manifest.json"),
    ],
)
def test_a_damaged_one_is_skipped_and_when_it_was_named_refused(
    name: str, content: bytes, said: str, remote: str, caplog: pytest.LogCaptureFixture
) -> None:
    with fsspec.open(f"{remote}/checkpoints/step_000010/{name}", "wb") as file:
        file.write(content)

    assert step_of(find_checkpoint(remote)) == 5
    assert "skipped a damaged checkpoint" in caplog.text
    assert said in caplog.text
    with pytest.raises(UserError, match=said) as caught:
        find_checkpoint(f"{remote}/checkpoints/step_000010")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("/nothing", "holds no checkpoint"),
        ("/bomb.pt", "a pickle is refused"),
    ],
)
def test_what_no_checkpoint_lies_at_is_one_line(end: str, said: str, remote: str) -> None:
    fsspec.filesystem("memory").pipe_file(f"{remote[8:]}/bomb.pt", b"\x80\x04\x95")

    with pytest.raises(UserError, match=said) as caught:
        find_checkpoint(remote + end)

    assert (caught.value.exit_code, "\n" in str(caught.value)) == (4, False)


def test_an_address_that_nothing_opens_is_one_line() -> None:
    with pytest.raises(UserError, match="RESUME: nonsense://bucket/x cannot be read") as caught:
        find_checkpoint("nonsense://bucket/x", key="RESUME")

    assert (caught.value.exit_code, "\n" in str(caught.value)) == (4, False)


def test_schedules_go_on_without_the_step_count(whole: RunResult, tmp_path: Path) -> None:
    given = [
        f"training.resume.checkpoint_path={whole.directory / 'checkpoints' / 'final'}",
        "training.resume.load_training_state=false",
        "training.scheduler.warmup_steps=2",
    ]

    goes_on = rows(train(tmp_path / "a", *given))
    anew = rows(train(tmp_path / "b", *given, "training.resume.load_scheduler_state=false"))
    first = rows(whole)

    assert [row["samples"] for row in goes_on] == [row["samples"] for row in first]
    assert [row["lambda"] for row in goes_on] == [1.0, 1.0, 1.0, 1.0]
    assert [row["lambda"] for row in anew] == [row["lambda"] for row in first]
    assert [goes_on[0]["lr"], anew[0]["lr"]] == [0.005, 0.0025]  # behind the warm-up, and at its first step


def test_a_stage_follows_the_nearest_one_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted = train(tmp_path, "training=stage1_subln", "training.max_steps=null", "training.batch_size=2")
    final = converted.directory / "checkpoints" / "final"
    assert (converted.step, converted.exit_code) == (0, 0)  # stage 1 is a conversion
    assert [name for name in weights(final) if "input_norm" in name]

    second = train(tmp_path, "training=stage2_pretrain", "training.batch_size=2")

    assert f"stage2 follows stage1: {final}" in capsys.readouterr().out
    assert second.directory == converted.directory.with_name("stage2_checkpoint")
    assert weights(second.directory / "checkpoints" / "final").keys() == weights(final).keys()
    assert [row["lambda"] for row in rows(second)] == [0.0, 1.0, 1.0, 1.0]
    assert rows(second)[0]["samples"] == [0, 1, 2, 3]  # nothing but the model is taken over

    (second.directory / "checkpoints").rename(second.directory / "aside")
    trained = tmp_path / "checkpoints" / "quick" / "stage1_9_checkpoint"
    trained.mkdir()
    (second.directory / "aside").rename(trained / "checkpoints")
    third = train(tmp_path, "training=stage2_pretrain", "training.batch_size=2")

    assert "stage2 follows stage1_9" in capsys.readouterr().out
    assert [row["lambda"] for row in rows(third)[-4:]] == [1.0, 1.0, 1.0, 1.0]  # what is ternary stays so


def test_a_stage_follows_one_that_lies_in_the_bucket(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = ["gcs.enabled=true", "gcs.bucket=memory://stages"]
    converted = train(tmp_path / "here", "training=stage1_subln", "training.max_steps=null", *bucket)

    elsewhere = train(tmp_path / "there", "training=stage2_pretrain", "training.max_steps=1", *bucket)

    assert "stage2 follows stage1: " in capsys.readouterr().out
    names = {name for name in weights(elsewhere.directory / "checkpoints" / "final") if "input_norm" in name}
    assert names == {
        name for name in weights(converted.directory / "checkpoints" / "final") if "input_norm" in name
    }
    assert names


def test_a_stage_with_nothing_before_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "training=stage2_pretrain", "training.batch_size=1", "training.max_steps=1")

    assert "stage2 starts from tiny_llama: no checkpoint of stage1_9, stage1" in capsys.readouterr().out


def test_other_documents_under_the_same_name_are_refused(tmp_path: Path) -> None:
    documents, shards = tmp_path / "documents.txt", tmp_path / "shards"
    config = tmp_path / "own.yaml"
    config.write_text(f"name: own\nsources:\n  mine: {{format: text, path: {documents}, weight: 1.0}}\n")
    given = [f"data.config_name={config}", f"data.directory={shards}"]
    documents.write_text("one and two and three\n" * 400)
    train(tmp_path, *given)
    shards.rename(tmp_path / "before")
    documents.write_text("four and five and six\n" * 400)

    with pytest.raises(UserError, match=r"found mine \(documents\)") as caught:
        train(tmp_path, *given, "training.max_steps=5")

    assert caught.value.exit_code == 2
    allowed = train(tmp_path, *given, "training.max_steps=5", "training.resume.allow=[data.sources.mine]")
    assert allowed.step == 5


def test_weights_that_fit_are_taken_and_the_others_are_named(
    whole: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = whole.directory / "checkpoints" / "final"
    with_norms = [
        "training.auto_convert.subln=output",
        "training.optimizer.lr_muon=0",
        "training.optimizer.lr_adam=0",
    ]

    result = train(
        tmp_path,
        f"training.resume.checkpoint_path={source}",
        "training.resume.strict_model_load=false",
        "training.max_steps=1",
        *FRESH,
        *with_norms,
    )

    taken, saved = weights(result.directory / "checkpoints" / "final"), weights(source)
    added = taken.keys() - saved.keys()
    assert added
    assert all(name.endswith("input_norm.weight") for name in added)
    assert all(torch.equal(taken[name], tensor) for name, tensor in saved.items())
    out = capsys.readouterr().out
    assert f"{len(added)} tensors not in the checkpoint" in out
    assert sorted(added)[0] in out


def test_a_mask_joins_the_tokens_that_a_model_suppresses() -> None:
    model = tiny_llama()
    assert model.generation_config is not None
    model.generation_config.suppress_tokens = [9]

    prepare_mask(model, None, DiffusionConfig(mask_token_id=7))

    assert model.generation_config.suppress_tokens == [7, 9]


def test_a_teacher_must_mean_the_same_by_a_token() -> None:
    from transformers import AutoTokenizer

    config = load_config(["model=tiny_llama"])
    own, other = load_tokenizer(config.model, None, None), AutoTokenizer.from_pretrained(TOKENIZER_DIR)
    other.add_tokens(["<one more>"])
    student, larger = tiny_llama(), tiny_llama()
    larger.resize_token_embeddings(student.config.vocab_size + 8)

    check_teacher(student, own, student, own)
    check_teacher(student, own, larger, own)  # the student may have a row for [MASK]
    size = len(own.get_vocab()) if own is not None else 0
    first = rf"token {size} is '<one more>', the student's is none"
    with pytest.raises(UserError, match=rf"{first}; {size + 1} tokens, the student has {size}\)") as caught:
        check_teacher(student, other, student, own)
    assert caught.value.exit_code == 4
    rows = student.config.vocab_size
    with pytest.raises(UserError, match=rf"found {rows + 8}, the student has {rows}\)") as caught:
        check_teacher(larger, None, student, own)
    assert caught.value.exit_code == 4


def test_the_first_token_that_another_tokenizer_of_the_same_size_has_elsewhere_is_named(
    tmp_path: Path,
) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(TOKENIZER_DIR, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    names = {number: token for token, number in content["model"]["vocab"].items()}
    content["model"]["vocab"] |= {names[300]: 411, names[411]: 300}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    own, other = (AutoTokenizer.from_pretrained(path) for path in (TOKENIZER_DIR, tmp_path))

    with pytest.raises(UserError) as caught:
        check_teacher(tiny_llama(), other, tiny_llama(), own)

    assert len(own) == len(other)
    assert caught.value.found == (
        f"token 300 is {names[411]!r}, the student's is {names[300]!r}; {len(own)} tokens, "
        f"the student has {len(own)}"
    )
    assert caught.value.exit_code == 4
