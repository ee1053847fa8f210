"""Held-out loss: mean cross entropy of the next token on the probes of each domain."""

from collections.abc import Mapping

import torch
from torch import nn

from bitnet_arch import block_diffusion_of
from data_handler.probes import Probe
from wrinklefree.objectives.continue_pretrain import ContinuePretrainObjective
from wrinklefree.objectives.manager import ObjectiveManager


@torch.no_grad()
def held_out_losses(
    model: nn.Module,
    probes: Mapping[str, Probe],
    *,
    block_size: int,
    batch_size: int,
    num_batches: int,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Source → mean loss over its first blocks; a probe shorter than a block is left out."""
    manager = ObjectiveManager({"continue_pretrain": ContinuePretrainObjective()})
    manager.diffusion = block_diffusion_of(model)
    found = {}
    for name, probe in probes.items():
        num_blocks = min(probe.shards.num_tokens // block_size, num_batches * batch_size)
        if num_blocks == 0:
            continue
        total, count = 0.0, 0
        for batch in probe.batches(block_size=block_size, batch_size=batch_size, num_samples=num_blocks):
            batch = manager.preprocess_batch(batch.to(device))
            part = manager.losses(model, None, batch)["continue_pretrain"]
            total, count = total + float(part.total), count + int(part.count)
        found[name] = total / max(1, count)
    return found
