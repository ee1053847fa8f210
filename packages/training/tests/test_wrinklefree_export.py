"""`wrinklefree export` is `bitnet_serving`'s command line, with the same exit codes and lines."""

from pathlib import Path
from typing import Any

from bitnet_serving.testing import save_tiny
from wrinklefree.runs import read_metrics


def test_a_checkpoint_is_exported_and_a_wrong_type_is_one_line(wrinklefree: Any, tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "model")

    written = wrinklefree("export", "gguf", checkpoint, tmp_path / "model.gguf", "--type", "f16")
    wrong = wrinklefree("export", "gguf", checkpoint, tmp_path / "other.gguf", "--type", "f17")
    unknown = wrinklefree("export", "gguf", checkpoint, tmp_path / "other.gguf", "--types", "f16")

    assert written.exit_code == 0
    assert (tmp_path / "model.gguf").read_bytes()[:4] == b"GGUF"
    assert wrong.exit_code == unknown.exit_code == 2
    assert "did you mean 'f16'?" in wrong.err
    assert "did you mean '--type'?" in unknown.err
    assert not (tmp_path / "other.gguf").exists()


def test_the_card_of_an_exported_run_has_its_last_loss_and_its_validation(
    wrinklefree: Any, tmp_path: Path
) -> None:
    small = ("training.max_seq_length=16", "training.max_steps=2", "training.influence.enabled=false")
    once = ("training.validation.num_batches=1", f"output_dir={tmp_path}")
    trained = wrinklefree("train", "experiment=quick", *small, *once)
    run = tmp_path / "checkpoints" / "quick" / "base_checkpoint"

    written = wrinklefree("export", "hf", run, tmp_path / "out", "--packed")

    assert (trained.exit_code, written.exit_code) == (0, 0)
    card = (tmp_path / "out" / "README.md").read_text()
    step = read_metrics(run / "metrics.jsonl")[-1]
    losses = read_metrics(run / "metrics.jsonl", kind="val")[-1]["losses"]["at 1"]
    assert "| optimizer steps | 2 |" in card
    assert f"| loss of the last step, all objectives | {step['loss']:.4f} |" in card
    assert f"| tokens | {step['tokens']:,} |" in card
    assert f"| validation loss (perplexity) | {sum(losses.values()) / len(losses):.4f} (" in card
