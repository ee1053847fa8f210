"""Muon over FSDP2 shards by the package `muon_fsdp2`, where it can: each matrix is computed on one rank.

`MuonClip` takes sharded parameters too, but then every rank computes every matrix. muon_fsdp2 0.3 needs CUDA,
a mesh of one dimension that is the whole world, rows that divide evenly, and `torch.compile`. Its update is
the same, up to the rounding of Newton-Schulz; parameters without a gradient count as having a gradient of
zero, and it writes into `grad`.
"""

import os
from importlib import import_module
from importlib.util import find_spec

import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from wrinklefree.optimizers.groups import Group

MUON_OPTIONS = ("lr", "momentum", "weight_decay", "use_muon")
ADAM_OPTIONS = ("lr", "betas", "eps", "weight_decay", "use_muon")


def why_not_muon_fsdp2(groups: list[Group], device_type: str = "cuda") -> str | None:
    """What stands against it, in words; none if it can be used."""
    matrices = [parameter for group in groups if group["use_muon"] for _, parameter in group["params"]]
    sharded = [matrix for matrix in matrices if isinstance(matrix, DTensor)]
    if not sharded or len(sharded) < len(matrices):
        return "parameters are not sharded"
    mesh = sharded[0].device_mesh
    if mesh.device_type != device_type:
        return f"runs on {mesh.device_type}"
    if mesh.ndim != 1 or mesh.size() != dist.get_world_size():
        return "the mesh is not one dimension over all ranks"
    if any(matrix.placements != (Shard(0),) or matrix.shape[0] % mesh.size() for matrix in sharded):
        return "rows do not divide evenly among the ranks"
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return "TORCH_COMPILE_DISABLE is set"
    return None if find_spec("muon_fsdp2") else "not installed"


def muon_fsdp2_optimizer(groups: list[Group]) -> Optimizer:
    """Our groups as it takes them; their other keys are added afterwards, because it accepts no others."""
    taken = []
    for group in groups:
        options = MUON_OPTIONS if group["use_muon"] else ADAM_OPTIONS
        plain = {key: group[key] for key in options}
        taken.append({"params": [parameter for _, parameter in group["params"]], **plain})
    optimizer: Optimizer = import_module("muon_fsdp2").Muon(taken)
    for ours, theirs in zip(groups, optimizer.param_groups, strict=True):
        theirs["param_names"] = [name for name, _ in ours["params"]]
        theirs.update({key: ours[key] for key in ours if key not in theirs})
    return optimizer
