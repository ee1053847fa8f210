"""Experts that are all the same leave a model what it was, in the engine and in the bytes of the file."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitnet_arch import load_bitnet
from bitnet_serving.encoding import decode_dense
from bitnet_serving.engine import Engine
from bitnet_serving.export import export_gguf
from bitnet_serving.fake_moe import convert_dense_to_fake_moe_gguf
from bitnet_serving.gguf_reader import GGUFFile, read_gguf
from bitnet_serving.testing import VOCAB_SIZE, save_tiny
from durable import UserError

NUM_LAYERS = 3
IDS = torch.randint(VOCAB_SIZE, (32,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "checkpoint"
    return save_tiny(directory, initializer_range=0.2, num_hidden_layers=NUM_LAYERS, change=lean)


def lean(model: nn.Module) -> None:
    """Tokens of language models have much in common, which a router must not take for a reason."""
    with torch.no_grad():
        embedding = model.get_parameter("model.embed_tokens.weight")
        embedding.add_(0.3 * torch.randn(embedding.shape[1], generator=torch.Generator().manual_seed(3)))


@pytest.fixture(scope="module")
def dense(checkpoint: Path) -> Path:
    export_gguf(checkpoint, checkpoint.parent / "dense.gguf", body="f16")
    return checkpoint.parent / "dense.gguf"


def engine_log_probs(path: Path) -> Tensor:
    rows = torch.full((len(IDS), VOCAB_SIZE), float("nan"), dtype=torch.double)
    with Engine(path) as engine:
        for row, top in zip(
            rows, engine.next_log_probs(IDS.tolist(), range(len(IDS)), VOCAB_SIZE), strict=True
        ):
            row[top.ids] = torch.tensor(top.log_probs, dtype=torch.double)
    return rows


def divergence(expected: Tensor, found: Tensor) -> float:
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def router(file: GGUFFile, layer: int) -> Tensor:
    tensor = file.tensors[f"blk.{layer}.ffn_gate_inp.weight"]
    return decode_dense("f32", file.data(tensor.name), *tensor.shape)


@pytest.mark.parametrize(
    ("export", "num_experts", "top_k"),
    [
        pytest.param({"body": "f16"}, 8, 2, id="f16"),
        pytest.param({"body": "f16"}, 3, 3, id="all of three"),
        pytest.param({"body": "tq2_0"}, 4, 1, id="padded tq2_0"),
        pytest.param({"body": "bf16"}, 5, 2, id="scales of their own"),
    ],
)
def test_the_engine_predicts_what_it_predicts_of_the_dense_file(
    tmp_path: Path, checkpoint: Path, export: dict[str, Any], num_experts: int, top_k: int
) -> None:
    export_gguf(checkpoint, tmp_path / "dense.gguf", **export)

    convert_dense_to_fake_moe_gguf(tmp_path / "dense.gguf", tmp_path / "moe.gguf", num_experts, top_k)

    kl = divergence(engine_log_probs(tmp_path / "dense.gguf"), engine_log_probs(tmp_path / "moe.gguf"))
    print(export, kl)
    assert kl <= 1e-6


def test_every_expert_is_the_dense_projection_and_all_else_is_copied(tmp_path: Path, dense: Path) -> None:
    path = convert_dense_to_fake_moe_gguf(
        dense, tmp_path / "moe.gguf", num_experts=5, top_k=2, model_name="five of a kind"
    )

    before, after = read_gguf(dense), read_gguf(path)
    experts = {"llama.expert_count": 5, "llama.expert_used_count": 2, "general.name": "five of a kind"}
    assert dict(after.metadata) == dict(before.metadata) | experts
    expected = {f"blk.{layer}.ffn_gate_inp.weight" for layer in range(NUM_LAYERS)}
    for name, tensor in before.tensors.items():
        stacked = name.replace(".weight", "_exps.weight")
        is_expert = any(role in name for role in ("ffn_gate", "ffn_up", "ffn_down"))
        found = after.tensors[stacked if is_expert else name]
        expected.add(found.name)
        assert found.shape == ((5, *tensor.shape) if is_expert else tensor.shape)
        for expert in after.data(found.name).view(-1, tensor.num_bytes):
            assert torch.equal(expert, before.data(name))
    assert after.tensors.keys() == expected


def test_tokens_spread_over_the_experts(tmp_path: Path, checkpoint: Path, dense: Path) -> None:
    """By PyTorch's inputs of every MLP: no expert has more than twice its share, and none has nothing."""
    file = read_gguf(convert_dense_to_fake_moe_gguf(dense, tmp_path / "moe.gguf", num_experts=8, top_k=2))
    model = load_bitnet(checkpoint)
    inputs: list[Tensor] = []
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))

    with torch.no_grad():
        model(torch.randint(VOCAB_SIZE, (8, 64), generator=torch.Generator().manual_seed(1)))

    for layer, x in enumerate(inputs):
        chosen = (x @ router(file, layer).t()).topk(2, dim=-1).indices
        counts = Counter(chosen.flatten().tolist())
        even = chosen.numel() / 8
        print(layer, {k: v / even for k, v in counts.items()})
        assert len(counts) == 8
        assert max(counts.values()) <= 2 * even


def test_a_checkpoint_is_exported_on_the_way(tmp_path: Path, checkpoint: Path) -> None:
    path = convert_dense_to_fake_moe_gguf(
        checkpoint, tmp_path / "new" / "moe.gguf", num_experts=4, quant_type="q8_0"
    )

    assert read_gguf(path).tensors["blk.0.ffn_up_exps.weight"].block_format.name == "q8_0"
    assert [each.name for each in path.parent.iterdir()] == ["moe.gguf"]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        pytest.param(
            {"num_experts": 4, "top_k": 5}, r"top_k: .* \(found 5\); fix: 1 to 4", id="too many used"
        ),
        pytest.param({"top_k": 0}, "top_k", id="none used"),
        pytest.param({"num_experts": 0}, "num_experts", id="no experts"),
        pytest.param({"num_experts": 100_000}, "num_experts", id="more than an engine holds"),
        pytest.param({"quant_type": "tq2_0"}, "--type tq2_0", id="another type"),
    ],
)
def test_what_cannot_be_made_is_refused(
    tmp_path: Path, dense: Path, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        convert_dense_to_fake_moe_gguf(dense, tmp_path / "moe.gguf", **settings)
    assert not list(tmp_path.iterdir())


def test_only_dense_llama_files_are_taken(tmp_path: Path, dense: Path) -> None:
    moe = convert_dense_to_fake_moe_gguf(dense, tmp_path / "moe.gguf")
    with pytest.raises(UserError, match=r"cannot be given experts \(found experts"):
        convert_dense_to_fake_moe_gguf(moe, tmp_path / "twice.gguf")

    normed = save_tiny(tmp_path / "normed", convert={"subln": "output"})
    with pytest.raises(UserError, match="architecture bitnet"):
        convert_dense_to_fake_moe_gguf(normed, tmp_path / "normed.gguf")
    assert not list(tmp_path.glob("*normed.gguf*"))
