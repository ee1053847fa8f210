"""`export hf`: plain transformers gives the checkpoint's logits, and the card has the numbers of the run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitnet_arch import (
    BitLinearLRC,
    Sparsity,
    load_bitnet,
    set_quant_amount,
    set_sparsity,
)
from bitnet_serving.cli import main
from bitnet_serving.stock_export import export_hf
from bitnet_serving.testing import VOCAB_SIZE, byte_level_tokenizer, save_tiny
from durable import UserError, publish

TEXT = "the quick brown fox"


def logits_of_transformers(directory: Path, ids: Tensor) -> Tensor:
    """By the classes of transformers and torch alone, eager: what they compile computes the same."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    model, info = loaded
    assert not any(info.values())
    assert {type(module).__module__.split(".")[0] for module in model.modules()} <= {"torch", "transformers"}
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits: Tensor = model(ids).logits
    return logits


def prompts() -> Tensor:
    return torch.randint(VOCAB_SIZE, (3, 4), generator=torch.Generator().manual_seed(1))


def distances(ours: Tensor, theirs: Tensor) -> list[float]:
    """Relative, of each prompt."""
    return [
        float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(theirs, ours, strict=True)
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_transformers_gives_the_logits_of_the_checkpoint(packed: bool, tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "model", convert={"subln": "output"})

    report = export_hf(checkpoint, tmp_path / "out", packed=packed)

    with torch.no_grad():
        ours = load_bitnet(checkpoint)(prompts()).logits
    found = distances(ours, logits_of_transformers(tmp_path / "out", prompts()))
    # One rounding to int8 may flip; not in all prompts.
    assert min(found) <= 1e-6
    assert max(found) <= 1e-2
    assert report.architecture == "BitNetForCausalLM"
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"]
        == (byte_level_tokenizer()(TEXT)["input_ids"])
    )
    assert report.files == {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}


def half(model: nn.Module) -> None:
    set_quant_amount(model, 0.5)


def sparse(model: nn.Module) -> None:
    set_sparsity(model, Sparsity(0.25))


def corrected(model: nn.Module) -> None:
    path = "model.layers.0.mlp.down_proj"
    layer: Any = BitLinearLRC.from_bitlinear(model.get_submodule(path), rank=2)  # type: ignore[arg-type]
    model.set_submodule(path, layer)
    layer.init_factors()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (half, "--at-full-quantisation"),
        (sparse, "with sparsity 0.25"),
        (corrected, "with a low-rank correction"),
    ],
)
def test_what_transformers_does_not_compute_is_one_line(
    change: Any, named: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_tiny(tmp_path / "model", change=change)

    code = main(argv=["export", "hf", str(checkpoint), str(tmp_path / "out")])

    out, err = capfd.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert named in err
    assert not (tmp_path / "out").exists()


def test_at_full_quantisation_is_the_model_with_all_of_it(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "model", change=half)

    export_hf(checkpoint, tmp_path / "out", at_full_quantisation=True)

    model = load_bitnet(checkpoint)
    with torch.no_grad():
        at_half = model(prompts()).logits
        set_quant_amount(model, 1.0)
        ours = model(prompts()).logits
    theirs = logits_of_transformers(tmp_path / "out", prompts())
    assert min(distances(ours, theirs)) <= 1e-6
    assert min(distances(at_half, theirs)) > 1e-2


def test_a_packed_checkpoint_stays_packed(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "model", save={"layout": "stock", "packed": True})

    with pytest.raises(UserError, match="add --packed"):
        export_hf(checkpoint, tmp_path / "out")
    export_hf(checkpoint, tmp_path / "out", packed=True)

    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (checkpoint / name).read_bytes()


def test_only_an_export_is_replaced_and_only_when_forced(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "model")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    export_hf(checkpoint, tmp_path / "out")

    for target, force in ((tmp_path / "out", False), (mine, False), (mine, True)):
        with pytest.raises(UserError) as refused:
            export_hf(checkpoint, target, replace_existing=force)
        assert refused.value.exit_code == 5
    export_hf(checkpoint, tmp_path / "out", packed=True, replace_existing=True)

    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


def a_run(directory: Path) -> Path:
    """A checkpoint after step 3 of a run that went on to step 4."""
    rows = [
        {"kind": "val", "step": 0, "losses": {"full precision": {"a": 1.0}, "at 1": {"a": 9.0, "b": 9.0}}},
        {"kind": "step", "step": 3, "loss": 2.75, "tokens": 12_345},
        {"kind": "val", "step": 3, "losses": {"now": {"a": 1.5, "b": 3.5}, "at 1": {"a": 2.0, "b": 4.0}}},
        {"kind": "step", "step": 4, "loss": 1.25, "tokens": 99_999},
        {"kind": "val", "step": 4, "losses": {"at 1": {"a": 0.5, "b": 0.5}}},
    ]
    lines = [json.dumps({"version": 1, **row}) for row in rows]
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "st']))
    (directory / "fingerprint.json").write_text(json.dumps({"fingerprint": "f" * 64}))
    saved = save_tiny(directory / "saved")
    with publish(
        directory / "checkpoints" / "step_000003", metadata={"step": 3, "stage": "stage2"}
    ) as checkpoint:
        for path in saved.iterdir():
            if path.name != "manifest.json":
                (checkpoint / path.name).write_bytes(path.read_bytes())
        (checkpoint / "train_state.json").write_text("{}")
    return directory


def test_the_card_has_the_numbers_of_that_step(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")

    report = export_hf(run, tmp_path / "out")

    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for row in (
        "| stage | stage2 |",
        "| optimizer steps | 3 |",
        "| tokens | 12,345 |",
        "| loss of the last step, all objectives | 2.7500 |",
        f"| validation loss (perplexity) | 3.0000 ({math.exp(3):.4g}) |",
        f"| … on b | 4.0000 ({math.exp(4):.4g}) |",
        f"| fingerprint of the run | `{'f' * 64}` |",
    ):
        assert row in card.splitlines()
    assert "train_state.json" not in report.files


def test_without_a_run_the_report_says_that_there_are_no_numbers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_tiny(tmp_path / "model")

    code = main(argv=["export", "hf", str(checkpoint), str(tmp_path / "out")])

    assert code == 0
    assert "no numbers in its model card" in capfd.readouterr().out
    assert "## Training" not in (tmp_path / "out" / "README.md").read_text()
