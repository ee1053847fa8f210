"""The optimizer of a run: one `torch.optim.Optimizer`, its groups named, learning rates at their peaks."""

import importlib
import logging
from typing import Any, assert_never

from torch import nn
from torch.optim import AdamW, Optimizer

from durable import UserError
from wrinklefree.optimizers.config import OptimizerConfig, OptimizerType
from wrinklefree.optimizers.groups import Group, parameter_groups
from wrinklefree.optimizers.muonclip import MuonClip
from wrinklefree.optimizers.sharded import muon_fsdp2_optimizer, why_not_muon_fsdp2

logger = logging.getLogger(__name__)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer that `config` describes, over the parameters of `model` that are to be trained."""
    groups = parameter_groups(model, config)
    sizes = ", ".join(f"{group['name']} {_num_elements(group):,} at lr {group['lr']:g}" for group in groups)
    match config.type:
        case OptimizerType.muonclip:
            optimizer, backend = _muonclip(groups)
        case OptimizerType.adamw:
            # The fused kernel is not there for parameters without storage, which a dry run has.
            is_meta = any(parameter.is_meta for parameter in model.parameters())
            optimizer, backend = AdamW(groups, fused=not is_meta), "torch"
        case OptimizerType.adamw_8bit:
            optimizer, backend = _bitsandbytes().AdamW8bit(groups), "bitsandbytes"
        case _:
            assert_never(config.type)
    logger.info("optimizer: %s (%s); %s", config.type, backend, sizes)
    return optimizer


def _num_elements(group: Group) -> int:
    return sum(parameter.numel() for _, parameter in group["params"])


def _muonclip(groups: list[Group]) -> tuple[Optimizer, str]:
    reason = why_not_muon_fsdp2(groups)
    if reason is None:
        return muon_fsdp2_optimizer(groups), "muon_fsdp2"
    return MuonClip(groups), f"torch; not muon_fsdp2: {reason}"


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        raise UserError(
            "training.optimizer.type: adamw_8bit needs the package bitsandbytes",
            error,
            "install bitsandbytes>=0.50, or set training.optimizer.type=adamw",
        ) from None
