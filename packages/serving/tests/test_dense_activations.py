"""What an engine's dense activations cost is measured against the model as it was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from bitnet_arch import Sparsity, load_bitnet, set_sparsity
from bitnet_serving.dense_activations import cost_of_dense_activations
from bitnet_serving.export import export_gguf
from bitnet_serving.testing import save_tiny

TEXT = "to be or not to be, that is the question"


def sparse(directory: Path, ratio: float) -> Path:
    sparsity = Sparsity(ratio=ratio)
    return save_tiny(directory, initializer_range=0.2, change=lambda model: set_sparsity(model, sparsity))


def test_the_cost_is_the_divergence_from_the_sparse_model(tmp_path: Path) -> None:
    checkpoint = sparse(tmp_path / "checkpoint", 0.5)
    model = load_bitnet(checkpoint)
    ids = torch.tensor([Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(TEXT).ids])
    log_probs: list[Tensor] = []
    for sparsity in (Sparsity(ratio=0.5), None):
        set_sparsity(model, sparsity)
        with torch.no_grad():
            log_probs.append(model(ids).logits[0].double().log_softmax(-1))
    as_trained, as_run = log_probs
    expected = torch.nn.functional.kl_div(as_run, as_trained, log_target=True, reduction="batchmean")

    cost = cost_of_dense_activations(checkpoint, text=TEXT)

    assert cost.num_positions == ids.numel()
    assert cost.kl == pytest.approx(float(expected), rel=1e-6)
    assert cost.kl > 0.01


def test_an_export_prints_the_cost(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"body": "f16", "dense_activations": True}
    reports = [
        export_gguf(sparse(tmp_path / f"{ratio}", ratio), tmp_path / f"{ratio}.gguf", **settings)
        for ratio in (0.2, 0.8)
    ]

    costs = [report.dense_cost for report in reports]
    assert costs[0] is not None
    assert costs[1] is not None
    assert 0 < costs[0].kl < costs[1].kl
    assert costs[0].num_positions == 256
    assert f"{costs[1].kl:.2e} nats of KL" in str(reports[1])


def test_a_model_that_is_dense_anyway_loses_nothing(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "checkpoint")

    assert (
        export_gguf(checkpoint, tmp_path / "model.gguf", body="f16", dense_activations=True).dense_cost
        is None
    )
