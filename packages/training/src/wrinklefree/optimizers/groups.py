"""Which rule moves which parameter, by the type of its module and its number of dimensions, never by a name.

    matrices inside decoder layers (the weight of a linear layer)     Muon     decayed
    embedding, head, low-rank factors, other matrices                 AdamW    decayed
    norms, SubLN, biases (one dimension)                              AdamW    not decayed

Frozen parameters are left out, tied ones are counted where they come first. Groups and the parameters in them
keep the order of the model.
"""

from typing import Any

from torch import nn

from bitnet_arch import walk
from durable import UserError
from wrinklefree.optimizers.config import OptimizerConfig, OptimizerType

Group = dict[str, Any]
"""A parameter group: `params` as (name, parameter) pairs, `name`, `decays`, and what the optimizer takes."""


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[Group]:
    """What the optimizer of this type takes; a group without parameters is left out."""
    if config.type is OptimizerType.muonclip:
        groups = [
            _group("muon", config, lr=config.lr_muon, use_muon=True, momentum=config.momentum),
            _group("adam", config, lr=config.lr_adam, use_muon=False, **_adam_options(config)),
            _group("adam_no_decay", config, lr=config.lr_adam, use_muon=False, **_adam_options(config)),
        ]
    else:
        groups = [
            _group("adam", config, lr=config.adamw_lr, **_adam_options(config)),
            _group("adam_no_decay", config, lr=config.adamw_lr, **_adam_options(config)),
        ]
    by_name = {group["name"]: group for group in groups}
    muon = by_name.get("muon", by_name["adam"])
    hidden = hidden_matrices(model)
    # named_parameters gives a shared parameter once, under its first name.
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            group = by_name["adam_no_decay"]
        else:
            group = muon if id(parameter) in hidden else by_name["adam"]
        group["params"].append((name, parameter))
    if not any(group["params"] for group in groups):
        raise UserError(
            f"{type(model).__name__} has no parameter to train",
            "all are frozen",
            "unfreeze some, or leave training out",
        )
    return [group for group in groups if group["params"]]


def hidden_matrices(model: nn.Module) -> set[int]:
    """Ids of the weights of all linear layers, less what embedding and head hold."""
    walked = walk(model)
    ends = {id(model.get_submodule(path).weight) for path in (walked.embedding, walked.head)}
    linears = (module for module in model.modules() if isinstance(module, nn.Linear))
    return {id(linear.weight) for linear in linears} - ends


def _adam_options(config: OptimizerConfig) -> Group:
    return {"betas": list(config.adam_betas), "eps": config.adam_eps}


def _group(name: str, config: OptimizerConfig, *, lr: float, **options: Any) -> Group:
    """`initial_lr` is the peak that the schedule multiplies; `decays` says whom weight decay concerns."""
    decays = name != "adam_no_decay"
    weight_decay = config.weight_decay if decays else 0.0
    rates = {"lr": lr, "initial_lr": lr, "weight_decay": weight_decay, "decays": decays}
    return {"name": name, "params": [], **rates, **options}
