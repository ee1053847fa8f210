"""A cache says what the teacher said, of this text and no other, whoever is killed meanwhile."""

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet_arch.testing import tiny_llama
from data_handler import Batch
from durable import UserError
from wrinklefree.config import load_config
from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.objectives import LogitsDistillationObjective, Needs, States, decoder_states
from wrinklefree.run import RunResult, run
from wrinklefree.runs import read_metrics
from wrinklefree.teachers.base import TopK
from wrinklefree.teachers.cached import CachedTeacher
from wrinklefree.teachers.identity import TeacherIdentity
from wrinklefree.teachers.local import LocalTeacher
from wrinklefree.teachers.store import TeacherStore

VOCAB_SIZE = 512
SMALL = [
    "model=tiny_llama",
    "training=base",
    "training.objectives.logits_distill.weight=1",
    "data=demo",
    "training.max_seq_length=32",
    "training.batch_size=2",
    "training.gradient_accumulation_steps=2",
    "training.max_steps=4",
    "training.checkpoint.save_interval=2",
    "training.validation.num_batches=0",
]
LOGITS = Needs(teacher_logits=True)


@pytest.fixture
def batch() -> Batch:
    """Two samples of two documents each."""
    input_ids = torch.randint(0, VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(3))
    document_ids = torch.zeros_like(input_ids)
    document_ids[0, 25:], document_ids[1, 11:] = 1, 1
    position_ids = torch.arange(40).expand(2, 40) - document_ids * torch.tensor([[25], [11]])
    return Batch(
        input_ids=input_ids,
        labels=input_ids.masked_fill(position_ids == 0, -100),
        position_ids=position_ids,
        document_ids=document_ids,
        source_id=torch.zeros(2, dtype=torch.int64),
        sample_id=torch.arange(2),
    )


def identity(**changed: Any) -> TeacherIdentity:
    usual: dict[str, Any] = {
        "backend": "local",
        "name": "tiny_llama",
        "weights": None,
        "dtype": "float32",
        "tokenizer": "abc",
        "vocab_size": VOCAB_SIZE,
        "excluded": None,
        "top_k": 5,
        "stored_as": "fp16",
    }
    return TeacherIdentity(**(usual | changed))


def decided(seed: int = 1) -> Any:
    """As sure of itself as a trained one: random weights alone hold all tokens for equally likely."""
    model = tiny_llama(seed=seed)
    with torch.no_grad():
        model.model.norm.weight.mul_(40)
    return model


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    """[B, T, V], no document seeing another."""
    return LocalTeacher(model).answer(batch, LOGITS, excluded=None).logits


def cached(directory: Path, *, model: Any = None, **changed: Any) -> CachedTeacher:
    store = TeacherStore(directory, identity(**changed), length=40)
    return CachedTeacher(store, lambda: LocalTeacher(decided() if model is None else model))


def never() -> LocalTeacher:
    raise AssertionError("the teacher was opened")


def told(teacher: CachedTeacher, batch: Batch) -> TopK:
    known = teacher.states(batch, LOGITS).next_tokens(torch.arange(80))(slice(None))
    assert isinstance(known, TopK)
    return known


def test_what_is_read_is_what_was_asked_for_and_needs_no_teacher(tmp_path: Path, batch: Batch) -> None:
    model = decided()
    dense = logits_of(model, batch).flatten(0, 1).log_softmax(-1)

    first = cached(tmp_path)
    asked = told(first, batch)
    again = told(first, batch)
    first.close()
    second = cached(tmp_path)
    second._open_teacher = never
    read = told(second, batch)

    assert (first.num_misses, first.num_hits, second.num_hits) == (2, 2, 2)
    for known in (again, read):
        assert torch.equal(known.ids, asked.ids)
        assert torch.equal(known.log_probs, asked.log_probs)
    assert torch.equal(asked.ids, dense.topk(5).indices)
    assert torch.equal(asked.log_probs, dense.topk(5).values.half().float())


def test_another_text_or_other_documents_are_never_taken_for_it(tmp_path: Path, batch: Batch) -> None:
    filled = cached(tmp_path)
    told(filled, batch)
    tokens, borders = batch.input_ids.clone(), batch.document_ids.clone()
    tokens[1, 39] += 1
    borders[1, 11] = 0

    for other in (replace(batch, input_ids=tokens), replace(batch, document_ids=borders)):
        before = filled.num_misses
        told(filled, other)
        assert filled.num_misses == before + 2
    moved = replace(batch, sample_id=batch.sample_id + 70, source_id=batch.source_id + 1)
    before = filled.num_misses
    told(filled, moved)
    assert filled.num_misses == before


def test_a_part_that_was_not_published_is_asked_for_again_and_nothing_else(
    tmp_path: Path, batch: Batch
) -> None:
    swapped = replace(batch, input_ids=batch.input_ids.flip(0), document_ids=batch.document_ids.flip(0))
    later = replace(batch, input_ids=(batch.input_ids + 1) % VOCAB_SIZE)
    killed = cached(tmp_path)
    told(killed, batch)
    killed.flush()
    told(killed, later)  # and then it dies
    (tmp_path / ".0123.bin.tmp-1a2b3c4d-4321-9f86d081").write_bytes(b"half a part")

    goes_on = cached(tmp_path)
    told(goes_on, swapped)
    told(goes_on, later)
    goes_on.close()

    assert (goes_on.num_hits, goes_on.num_misses) == (2, 2)
    assert len(list(tmp_path.glob("*.bin"))) == 2
    assert len(TeacherStore(tmp_path, identity(), length=40)) == 4


@pytest.mark.parametrize("k", [7, VOCAB_SIZE])
@pytest.mark.parametrize("stored_as", ["fp16", "fp32"])
def test_the_excluded_token_has_no_probability(tmp_path: Path, batch: Batch, k: int, stored_as: str) -> None:
    teacher = cached(tmp_path, excluded=17, top_k=k, stored_as=stored_as)
    logits = logits_of(decided(), batch).flatten(0, 1)
    logits[:, 17] = -torch.inf
    expected = logits.log_softmax(-1).topk(k).values

    known = teacher.states(batch, LOGITS, excluded=17).next_tokens(torch.arange(80))(slice(None))

    assert isinstance(known, TopK)
    stored = expected.half().float() if stored_as == "fp16" else expected
    torch.testing.assert_close(known.log_probs, stored, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "tiny_qwen3"}, "name tiny_llama → tiny_qwen3"),
        ({"dtype": "bfloat16"}, "dtype float32 → bfloat16"),
        ({"top_k": 6}, "top_k 5 → 6"),
        ({"stored_as": "fp32"}, "stored_as fp16 → fp32"),
        ({"tokenizer": "def", "excluded": 3}, "tokenizer abc → def; excluded None → 3"),
    ],
)
def test_what_another_teacher_said_is_refused(
    changed: dict[str, Any], said: str, tmp_path: Path, batch: Batch
) -> None:
    filled = cached(tmp_path)
    told(filled, batch)
    filled.close()

    with pytest.raises(UserError, match=said) as caught:
        cached(tmp_path, **changed)

    assert caught.value.exit_code == 4
    assert f"{identity().fingerprint} → {identity(**changed).fingerprint}" in str(caught.value)


def test_other_weights_under_the_same_name_are_refused_and_the_same_elsewhere_are_not(tmp_path: Path) -> None:
    one, same = identity(name="a", weights="11"), identity(name="b", weights="11")

    assert not same.differences(one)
    assert identity(name="a", weights="22").differences(one) == ["weights 11 → 22"]
    assert not identity(name="a").differences(one)  # they are not on this disk
    assert identity(name="b").differences(one) == ["name a → b"]


def test_other_documents_under_the_same_name_are_refused(tmp_path: Path, batch: Batch) -> None:
    store = TeacherStore(tmp_path, identity(), length=40, sources={"web": "1" * 64})
    told(CachedTeacher(store, lambda: LocalTeacher(decided())), batch)
    store.flush()

    TeacherStore(tmp_path, identity(), length=40, sources={"web": "1" * 64, "code": "3" * 64})
    with pytest.raises(UserError, match=r"is about other data.*web 1{16} → 2{16}") as caught:
        TeacherStore(tmp_path, identity(), length=40, sources={"web": "2" * 64})

    assert caught.value.exit_code == 4


@pytest.mark.parametrize("damage", ["flipped", "cut", "foreign", "manifest", "version"])
def test_damage_is_one_line_that_names_the_file(damage: str, tmp_path: Path, batch: Batch) -> None:
    filled = cached(tmp_path)
    told(filled, batch)
    filled.close()
    (part,) = tmp_path.glob("*.bin")
    content = bytearray(part.read_bytes())
    if damage == "flipped":
        content[-3] ^= 4
        part.write_bytes(content)
    elif damage == "cut":
        part.write_bytes(content[:-1])
    elif damage == "foreign":
        part.write_bytes(b"PK\3\4" * 20)
    elif damage == "manifest":
        (tmp_path / "teacher.json").write_text('{"format_version": 1, "teacher": {')
    else:
        (tmp_path / "teacher.json").write_text('{"format_version": 2}')

    with pytest.raises(UserError) as caught:
        told(cached(tmp_path), batch)

    named = "teacher.json" if damage in ("manifest", "version") else part.name
    assert named in str(caught.value)
    assert caught.value.exit_code == 4


def test_a_directory_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")

    with pytest.raises(UserError, match="is no cache and not empty"):
        cached(tmp_path)


@pytest.mark.parametrize(
    ("k", "stored_as", "at_most"),
    [
        # Float32 roundings.
        (VOCAB_SIZE, "fp32", 1e-6),
        # Half a step of fp16 at 16 is 1/128, of a probability that small; where it matters, below 1 %.
        (VOCAB_SIZE, "fp16", 2e-3),
        (64, "fp16", 1e-2),
    ],
)
def test_how_far_a_cached_loss_is_from_the_teachers(
    k: int,
    stored_as: str,
    at_most: float,
    tmp_path: Path,
    batch: Batch,
    record_property: Callable[[str, object], None],
) -> None:
    student, needs = decided(seed=2), LOGITS
    ours = decoder_states(student, batch)
    online = States(student=ours, teacher=LocalTeacher(decided()).states(batch, needs))
    expected = LogitsDistillationObjective()(online, batch).mean()

    teacher = cached(tmp_path, top_k=k, stored_as=stored_as)
    offline = States(student=ours, teacher=teacher.states(batch, needs))
    loss = LogitsDistillationObjective()(offline, batch).mean()

    deviation, mass = abs(loss / expected - 1).item(), teacher.take_numbers()["teacher_mass"]
    record_property("deviation", deviation)
    print(f"k={k} {stored_as}: {mass:.4%} of the probability, loss {deviation:.2e} off")
    assert deviation <= at_most
    assert mass > 0.99


def train(output_dir: Path, *overrides: str) -> RunResult:
    return run(load_config([*SMALL, f"output_dir={output_dir}", *overrides]))


def rows(result: RunResult) -> list[dict[str, Any]]:
    volatile = ("tokens_per_second", "data_wait_seconds", "teacher_seconds")
    found = read_metrics(result.directory / "metrics.jsonl")
    assert all(row[name] >= 0 for row in found for name in volatile)
    return [{name: value for name, value in row.items() if name not in volatile} for row in found]


def test_runs_that_fill_read_and_resume_are_the_same_to_the_bit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher, cache = tmp_path / "teacher", tmp_path / "cache"
    tiny_llama(seed=5).save_pretrained(teacher)
    there = [f"training.teacher.pretrained_name={teacher}", "training.teacher.top_k=9"]

    filling = rows(train(tmp_path / "filling", *there, f"training.teacher.cache={cache}"))
    shutil.copytree(cache, tmp_path / "copy")
    assert len(list(cache.glob("*.bin"))) == 2  # one before each checkpoint: a kill costs nothing after it
    usual = WrinkleFreeLightningModule.training_step

    def training_step(self: WrinkleFreeLightningModule, *arguments: Any) -> None:
        if self.progress.step == 2:
            signal.raise_signal(signal.SIGTERM)
        usual(self, *arguments)

    fresh = f"training.teacher.cache={tmp_path / 'fresh'}"
    with monkeypatch.context() as patch:
        patch.setattr(WrinkleFreeLightningModule, "training_step", training_step)
        assert train(tmp_path / "stopped", *there, fresh).exit_code == 143
    resumed = rows(train(tmp_path / "stopped", *there, fresh))
    (teacher / "model.safetensors").unlink()
    reading = rows(train(tmp_path / "reading", *there, f"training.teacher.cache={cache}"))

    assert reading == filling
    assert resumed == filling
    assert all(0 < row["teacher_mass"] < 1 for row in filling)
    # What was there was not written again.
    assert {path.name for path in cache.iterdir()} == {path.name for path in (tmp_path / "copy").iterdir()}
    content = json.loads((cache / "teacher.json").read_text())
    assert content["teacher"]["name"] == str(teacher)
    assert content["sources"]

    qwen = ["training.teacher.pretrained_name=tiny_qwen3", "training.teacher.top_k=8"]
    with pytest.raises(UserError, match=r"tiny_qwen3.*top_k 9 → 8") as caught:
        train(tmp_path / "other", *qwen, f"training.teacher.cache={cache}")
    assert caught.value.exit_code == 4


def test_the_whole_vocabulary_in_fp32_is_the_online_teacher(tmp_path: Path) -> None:
    online = rows(train(tmp_path / "online", "training.max_steps=1"))
    everything = [f"training.teacher.top_k={VOCAB_SIZE}", "training.teacher.cache_dtype=fp32"]
    offline = rows(
        train(
            tmp_path / "off", "training.max_steps=1", *everything, f"training.teacher.cache={tmp_path / 'c'}"
        )
    )

    # Two float32 roundings of numbers around 6. After a step, ternary weights may differ by a whole code.
    assert [row["loss"] for row in offline] == pytest.approx([row["loss"] for row in online], abs=2e-6)
    assert [row["teacher_mass"] for row in offline] == pytest.approx([1], abs=1e-5)
