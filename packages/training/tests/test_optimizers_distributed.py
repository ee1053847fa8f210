"""Two processes over gloo, on a CPU: MuonClip on FSDP2 shards, and QK-clip by the largest logit of any rank.

The workers are this very file, run as a script. Each plays the single process itself and leaves what it saw.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from bitnet_arch.testing import tiny_llama
from wrinklefree.optimizers.build import build_optimizer
from wrinklefree.optimizers.config import OptimizerConfig
from wrinklefree.optimizers.groups import parameter_groups
from wrinklefree.optimizers.muonclip import MuonClip
from wrinklefree.optimizers.qk_clip import QKClip
from wrinklefree.optimizers.sharded import why_not_muon_fsdp2

pytestmark = pytest.mark.slow
NUM_RANKS = 2


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    environment = os.environ | {"GLOO_SOCKET_IFNAME": loopback, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(NUM_RANKS)
    ]
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]


def test_muonclip_moves_sharded_weights_as_whole_ones(seen: list[dict[str, Any]]) -> None:
    # Whole oblong matrices go through G, which is true to 2e-3 (test_muonclip.py); shards cannot.
    for rank in seen:
        assert rank["moved"] > 1e-2
        assert rank["difference"] < 2e-3 * rank["moved"]


def test_muon_fsdp2_is_not_taken_on_a_cpu(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["backend"] == "MuonClip"
    assert seen[0]["reason"] == "runs on cpu"


def test_ranks_clip_by_the_largest_logit_of_any(seen: list[dict[str, Any]]) -> None:
    first, second = seen

    assert first["own_logit"] != second["own_logit"]
    assert first["stats"] == second["stats"]
    assert first["stats"][0] == max(first["own_logit"], second["own_logit"])
    assert first["query"] == second["query"]


def _work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=NUM_RANKS)
    found = _sharded_steps() | _clipped(rank)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _sharded_steps() -> dict[str, Any]:
    config = OptimizerConfig(lr_muon=0.02, lr_adam=1e-3, weight_decay=0.1)
    whole, sharded = (tiny_llama(num_hidden_layers=1) for _ in range(2))
    before = [parameter.detach().clone() for parameter in whole.parameters()]
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    tokens = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(1))
    for model in (whole, sharded):
        optimizer = build_optimizer(model, config)
        assert isinstance(optimizer, MuonClip)
        # In bf16, rounding alone would move small singular values by more than any fault.
        optimizer.newton_schulz_dtype = torch.float32
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    pairs = zip(before, whole.parameters(), sharded.parameters(), strict=True)
    rows = [_largest(was, now, other) for was, now, other in pairs]
    return {
        "backend": type(optimizer).__name__,
        "reason": why_not_muon_fsdp2(parameter_groups(sharded, config)),
        "moved": max(row[0] for row in rows),
        "difference": max(row[1] for row in rows),
    }


def _largest(before: Tensor, whole: nn.Parameter, sharded: nn.Parameter) -> tuple[float, float]:
    gathered = sharded.detach()
    assert isinstance(gathered, DTensor)
    now = whole.detach()
    return (now - before).abs().max().item(), (gathered.full_tensor() - now).abs().max().item()


def _clipped(rank: int) -> dict[str, Any]:
    model = tiny_llama()
    clip = QKClip(model, threshold=0.05)
    with clip.recording():
        model(torch.arange(20)[None] + 7 * rank)
    assert clip.max_logits_LH is not None
    own_logit = clip.max_logits_LH.max().item()
    stats = clip.clip()
    assert stats is not None
    query = model.model.layers[0].self_attn.q_proj.weight
    return {
        "own_logit": own_logit,
        "stats": [stats.max_logit, stats.num_clipped],
        "query": query.flatten()[:50].tolist(),
    }


if __name__ == "__main__":
    _work(int(sys.argv[1]), Path(sys.argv[2]))
