"""What happens around the steps of a run, seen in the files that real runs leave."""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from bitnet_arch import load_bitnet
from bitnet_arch.bitlinear import bitlinears
from data_handler.demo import TOKENIZER_DIR
from durable import UserError, read_manifest
from wrinklefree.config import load_config
from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.objectives import ManagerOutput, ObjectiveManager
from wrinklefree.run import RunResult, run
from wrinklefree.runs import read_metrics
from wrinklefree.training.data import open_loader, prepare_data

SMALL = [
    "experiment=quick",
    "training.influence.enabled=false",
    "training.validation.num_batches=0",
    "training.max_seq_length=32",
    "training.max_steps=4",
    "training.checkpoint.save_interval=1",
    "training.checkpoint.keep_last_n=10",
    "training.logging.log_interval=100",
]
WATCHED = [
    "training.validation.num_batches=1",
    "training.validation.every=1",
    "training.samples.every=2",
    "training.samples.prompts=[the,a house]",
    "training.samples.max_new_tokens=6",
    "training.logging.ternary_interval=2",
]


def train(output_dir: Path, *overrides: str) -> RunResult:
    return run(load_config([*SMALL, f"output_dir={output_dir}", *overrides]))


def rows(directory: Path, kind: str = "step") -> list[dict[str, Any]]:
    return read_metrics(directory / "metrics.jsonl", kind=kind)


def step_dir(directory: Path, step: int) -> Path:
    return directory / "checkpoints" / f"step_{step:06d}"


def stopping_after(step: int) -> Callable[..., Any]:
    """A training step that sends this process SIGTERM when `step` is under way."""
    usual = WrinkleFreeLightningModule.training_step

    def training_step(self: WrinkleFreeLightningModule, *arguments: Any) -> None:
        if self.progress.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        usual(self, *arguments)

    return training_step


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody watches."""
    return train(tmp_path_factory.mktemp("plain"), "training.logging.ternary_interval=null").directory


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with everything that only looks; stopped between two looks, and gone on with."""
    output_dir = tmp_path_factory.mktemp("watched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WrinkleFreeLightningModule, "training_step", stopping_after(3))
        assert train(output_dir, *WATCHED).exit_code == 143
    return train(output_dir, *WATCHED).directory


def test_looking_changes_no_bit(plain: Path, watched: Path) -> None:
    assert [row["loss"] for row in rows(watched)] == [row["loss"] for row in rows(plain)]
    expected, found = (
        load_file(directory / "checkpoints" / "final" / "model.safetensors") for directory in (plain, watched)
    )
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def codes(weight: Tensor) -> Tensor:
    """The formula of BitNet b1.58, written out once more."""
    return (weight / weight.abs().double().mean().float()).round().clamp(-1, 1)


def test_zeros_and_flips_are_those_of_the_weights_on_disk(watched: Path) -> None:
    found = rows(watched, "ternary")

    assert [(row["since"], row["step"]) for row in found] == [(0, 2), (2, 4)]
    before, after = (load_file(step_dir(watched, step) / "model.safetensors") for step in (2, 4))
    layers = found[-1]["layers"]
    assert len(layers) == 7 * load_bitnet(step_dir(watched, 4)).config.num_hidden_layers
    for name, share in layers.items():
        old, new = codes(before[f"{name}.weight"]), codes(after[f"{name}.weight"])
        assert share["zeros"] == pytest.approx(float((new == 0).float().mean()))
        assert share["flips"] == pytest.approx(float((new != old).float().mean()))
    assert any(share["flips"] > 0 for share in layers.values())


def test_best_is_the_step_with_the_smallest_validation_loss(watched: Path) -> None:
    losses = {row["step"]: row["losses"]["at 1"] for row in rows(watched, "val") if row["step"] > 0}
    means = {step: sum(each.values()) / len(each) for step, each in losses.items()}
    best = min(means, key=lambda step: means[step])
    assert len(means) == 4

    path = watched / "checkpoints" / "best"

    assert read_manifest(path).metadata["step"] == best
    expected = (step_dir(watched, best) / "model.safetensors").read_bytes()
    assert (path / "model.safetensors").read_bytes() == expected
    state = json.loads((path / "train_state.json").read_text())["parts"]["best"]
    assert state == {"step": best, "loss": means[best]}


def test_samples_are_what_transformers_generates(watched: Path) -> None:
    found = [json.loads(line) for line in (watched / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == [2, 2, 2, 2, 4, 4, 4, 4]
    model, tokenizer = load_bitnet(step_dir(watched, 4)), AutoTokenizer.from_pretrained(TOKENIZER_DIR)

    for row in found[4:]:
        tokens = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        greedy: Tensor = model.generate(  # type: ignore[operator]
            tokens, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
        )
        text = tokenizer.decode(greedy[0, tokens.shape[1] :])
        assert (row["text"] == text) == (row["temperature"] == 0)


def test_a_mask_in_held_out_text_is_not_asked_for(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"one <|mask|> {number} " * 12}) for number in range(100)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    (tmp_path / "own.yaml").write_text(
        f"name: own\nsources:\n  own: {{format: jsonl, path: {tmp_path}/text.jsonl, probe_one_in: 5}}\n"
    )
    result = train(
        tmp_path,
        f"data.config_name={tmp_path / 'own.yaml'}",
        f"data.directory={tmp_path / 'data'}",
        "training.objectives.dlm={weight: 1.0}",
        "training.validation.num_batches=1",
        "training.max_steps=1",
    )

    (first, *_) = read_metrics(result.directory / "metrics.jsonl", kind="val")
    assert all(isinstance(loss, float) for each in first["losses"].values() for loss in each.values())


def test_prompts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"samples.prompts") as caught:
        train(tmp_path, "training.samples.every=1", "training.samples.max_new_tokens=100000")

    assert caught.value.exit_code == 2


PLATEAU = [
    "training.validation.num_batches=1",
    "training.validation.every=1",
    "training.max_steps=6",
    "training.early_stopping.enabled=true",
    "training.early_stopping.min_delta=10",
    "training.early_stopping.patience=2",
    "training.early_stopping.min_evals=2",
]


def test_a_plateau_ends_the_run_for_good_until_there_is_more_patience(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    result = train(tmp_path, *PLATEAU)

    # Validation 1 is the best so far, 2 and 3 are not better by 10.
    assert (result.step, result.exit_code) == (3, 0)
    assert "stopping early at step 3" in capsys.readouterr().out
    assert rows(result.directory, "event")[-1]["event"] == "early_stopping"
    final = result.directory / "checkpoints" / "final"
    assert read_manifest(final).metadata["step"] == 3

    caplog.set_level("INFO")
    again = train(tmp_path, *PLATEAU)
    assert (again.step, again.exit_code) == (3, 0)
    assert "complete" in caplog.text
    assert "by 10" in caplog.text

    shutil.rmtree(final)  # a kill may have come before it
    train(tmp_path, *PLATEAU)
    assert read_manifest(final).metadata["step"] == 3

    more = train(tmp_path, *PLATEAU, "training.early_stopping.patience=4")
    assert (more.step, more.exit_code) == (5, 0)
    assert read_manifest(final).metadata["step"] == 5


def test_early_stopping_needs_validation() -> None:
    with pytest.raises(UserError, match="nothing is measured before the end") as caught:
        load_config(["training.early_stopping.enabled=true", "training.validation.every=null"])

    assert caught.value.exit_code == 2


def test_a_length_in_tokens_holds_when_the_batch_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = ["training.max_steps=null", f"training.total_tokens={6 * 4 * 32 + 5}"]
    with monkeypatch.context() as patch:
        patch.setattr(WrinkleFreeLightningModule, "training_step", stopping_after(4))
        assert train(tmp_path, *length).step == 4

    result = train(tmp_path, *length, "training.batch_size=1", "training.resume.allow=[training.batch_size]")

    # Half as many samples in a step: 12 steps in all, were it not for those behind us.
    assert (result.step, result.exit_code) == (4 + 5, 0)
    found = rows(result.directory)
    assert [row["tokens"] for row in found[-6:]] == [512, 576, 640, 704, 768, 832]
    assert (
        train(tmp_path, *length, "training.batch_size=1", "training.resume.allow=[training.batch_size]").step
        == 9
    )


def test_clipping_says_what_it_did(plain: Path, tmp_path: Path) -> None:
    result = train(
        tmp_path,
        "training.gradient_clipping.max_norm=null",
        "training.gradient_clipping.zclip.enabled=true",
        "training.gradient_clipping.zclip.warmup_steps=2",
        "training.gradient_clipping.zclip.z_threshold=0.001",
        "training.gradient_clipping.zclip.mode=mean",
        "training.optimizer.clipping_threshold=0.001",
        "training.max_steps=3",
    )

    first, second, third = rows(result.directory)
    norms = [first["grad_norm"], second["grad_norm"]]
    mean, deviation = sum(norms) / 2, abs(norms[0] - norms[1]) / 2
    assert first["z_score"] == second["z_score"] == 0
    assert third["z_score"] == pytest.approx((third["grad_norm"] - mean) / (deviation + 1e-6))
    is_spike = third["z_score"] > 0.001
    assert third["clipped_norm"] == pytest.approx(mean if is_spike else third["grad_norm"])
    for row in (first, second, third):
        assert row["qk_factor"] == pytest.approx(min(1.0, 0.001 / row["max_logit"]))
    assert first["qk_factor"] < 1
    assert "z_score" not in rows(plain)[0]


def test_sparsity_grows_with_its_ramp_and_not_before_conversion(watched: Path, tmp_path: Path) -> None:
    result = train(
        tmp_path,
        *WATCHED,
        "training.activation_sparsity.enabled=true",
        "training.activation_sparsity.mode=block",
        "training.activation_sparsity.block.n=1",
        "training.activation_sparsity.warmup.warmup_steps=3",
    )

    found = rows(result.directory)
    assert [row["sparsity"] for row in found] == pytest.approx([0, 0.25, 0.5, 0.75])
    model = load_bitnet(result.directory / "checkpoints" / "final")
    assert all(layer.sparsity is not None for layer in bitlinears(model))
    assert {(layer.sparsity.ratio, layer.sparsity.block) for layer in bitlinears(model)} == {(0.75, 4)}  # type: ignore[union-attr]
    dense, sparse = (rows(directory, "val")[0]["losses"] for directory in (watched, result.directory))
    assert sparse["full precision"] == dense["full precision"]
    assert sparse["at 1"] != dense["at 1"]


def test_a_step_without_finite_numbers_is_dumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, calls = ObjectiveManager.step, iter(range(100))

    def step(self: ObjectiveManager, *arguments: Any) -> ManagerOutput:
        output = usual(self, *arguments)
        factor = math.nan if next(calls) == 3 else 1.0  # in the second step, the second micro-batch
        return ManagerOutput(loss=output.loss * factor, losses=output.losses, ce_loss=output.ce_loss)

    monkeypatch.setattr(ObjectiveManager, "step", step)
    result = train(tmp_path)

    content = json.loads((result.directory / "non_finite" / "step_000002.json").read_text())
    assert content["step"] == 2
    assert content["not_finite"] == ["loss", "grad_norm"]
    assert "model.layers.0.self_attn.q_proj.weight" in content["parameters"]
    config = load_config(SMALL)
    with open_loader(config, prepare_data(config)) as loader:
        batches = list(loader)[2:4]
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_DIR)
    expected = {
        str(int(sample)): tokenizer.decode(tokens)
        for batch in batches
        for sample, tokens in zip(batch.sample_id, batch.input_ids, strict=True)
    }
    assert {sample: shown["text"] for sample, shown in content["samples"].items()} == expected
