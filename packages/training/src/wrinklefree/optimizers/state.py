"""An optimizer's state as tensors and json, keyed by the names of parameters, and back to the bit.

Names hold where indices do not: a checkpoint whose parameters come in another order is still read right, and
one of another model is refused. Tensors are put back as they are, where `Optimizer.load_state_dict` would
cast them to the dtype of their parameter. Optimizers are built with named parameters (`param_names`) and
named groups.
"""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from durable import ExitCode, UserError

SEPARATOR = "/"
"""Between the name of a parameter and that of its state; names of parameters have dots."""
IDENTITY = ("params", "param_names", "name")
"""What a group is, as opposed to its options."""


def split_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `safetensors` takes, and what json takes: groups, numbers, and which tensors are the same one.

    The tensors are the live ones: write them before the next step.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    same: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, parameter in _named(optimizer).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            path = f"{name}{SEPARATOR}{key}"
            if not isinstance(value, Tensor):
                numbers[path] = _jsonable(value)
                continue
            # 8-bit optimizers give all parameters the same code book; a file holds it once.
            place = (value.data_ptr(), value.dtype, value.shape) if value.data_ptr() else (path,)
            if first.setdefault(place, path) == path:
                tensors[path] = value.detach()
            else:
                same[path] = first[place]
    groups = [
        {key: _jsonable(group[key]) for key in group if key != "params"} for group in optimizer.param_groups
    ]
    return tensors, {"groups": groups, "numbers": numbers, "same": same}


def join_state(
    optimizer: Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any], *, with_options: bool = True
) -> None:
    """Put back what `split_state` gave. Without options, learning rates and the like stay as configured."""
    named = _named(optimizer)
    saved = {group["name"]: group for group in rest["groups"]}
    _check(optimizer.param_groups, saved)
    leaves = {**rest["numbers"], **tensors, **{path: tensors[of] for path, of in rest["same"].items()}}
    states: dict[str, dict[str, Any]] = {}
    for path, value in leaves.items():
        name, _, key = path.rpartition(SEPARATOR)
        if name not in named:
            raise _foreign(f"state of {name}")
        copy = value.to(named[name].device, copy=True) if isinstance(value, Tensor) else value
        states.setdefault(name, {})[key] = copy
    optimizer.state.clear()
    optimizer.state.update({named[name]: state for name, state in states.items()})
    if with_options:
        for group in optimizer.param_groups:
            options = saved[group["name"]]
            group.update({key: _like(group.get(key), options[key]) for key in options if key not in IDENTITY})


def _named(optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def _jsonable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    assert value is None or isinstance(value, (bool, int, float, str)), type(value)
    return value


def _like(present: Any, saved: Any) -> Any:
    """json has no tuples."""
    return tuple(saved) if isinstance(present, tuple) and isinstance(saved, list) else saved


def _check(present: list[dict[str, Any]], saved: dict[str, dict[str, Any]]) -> None:
    """The same groups, each with the same parameters, in whatever order."""
    names = [group["name"] for group in present]
    if set(names) != saved.keys():
        raise _foreign(f"groups {', '.join(saved)} instead of {', '.join(names)}")
    for group in present:
        odd = sorted(set(group["param_names"]) ^ set(saved[group["name"]]["param_names"]))
        if odd:
            raise _foreign(f"group {group['name']} differs in {len(odd)} parameters, among them {odd[0]}")


def _foreign(found: str) -> UserError:
    return UserError(
        "optimizer state: belongs to another model or optimizer",
        found,
        "resume with the configuration of the checkpoint, or with training.resume.load_optimizer_state=false",
        ExitCode.BAD_DATA,
    )
