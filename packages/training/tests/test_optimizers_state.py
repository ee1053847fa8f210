"""An optimizer's state through json and safetensors, and back to the bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from bitnet_arch.testing import tiny_llama, tiny_mistral
from durable import ExitCode, UserError
from wrinklefree.optimizers.build import build_optimizer
from wrinklefree.optimizers.config import OptimizerConfig, OptimizerType
from wrinklefree.optimizers.schedule import apply_schedule
from wrinklefree.optimizers.state import join_state, split_state

TYPES = [OptimizerType.muonclip, OptimizerType.adamw]


@pytest.mark.parametrize("kind", TYPES)
def test_a_run_goes_on_to_the_bit_from_files(kind: OptimizerType, tmp_path: Path) -> None:
    model, optimizer = _started(kind, steps=3)
    _save(optimizer, tmp_path)
    resumed = tiny_llama()
    resumed.load_state_dict(model.state_dict())
    other = build_optimizer(resumed, _config(kind))

    join_state(other, *_load(tmp_path))
    for step in (3, 4, 5):
        _step(model, optimizer, step)
        _step(resumed, other, step)

    _assert_equal(other.state_dict(), optimizer.state_dict())
    for (name, mine), (_, theirs) in zip(model.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("kind", TYPES)
def test_the_state_before_the_first_step_is_empty_and_comes_back(kind: OptimizerType, tmp_path: Path) -> None:
    optimizer = build_optimizer(tiny_llama(), _config(kind))
    _save(optimizer, tmp_path)
    other = build_optimizer(tiny_llama(), _config(kind))

    join_state(other, *_load(tmp_path))

    _assert_equal(other.state_dict(), optimizer.state_dict())


def test_state_dict_holds_what_needs_no_pickle() -> None:
    _, optimizer = _started(OptimizerType.muonclip, steps=1)

    def check(value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                assert isinstance(key, (str, int))
                check(inner)
        elif isinstance(value, list):
            for inner in value:
                check(inner)
        else:
            assert value is None or type(value) in (Tensor, int, float, str, bool), type(value)

    check(optimizer.state_dict())


def test_tensors_are_named_after_parameters() -> None:
    _, optimizer = _started(OptimizerType.muonclip, steps=1)

    tensors, rest = split_state(optimizer)

    name = "model.layers.1.mlp.down_proj.weight"
    assert tensors[f"{name}/momentum_buffer"].shape == (64, 176)
    assert tensors["model.norm.weight/exp_avg"].shape == (64,)
    assert name in rest["groups"][0]["param_names"]


def test_parameters_that_come_in_another_order_find_their_state(tmp_path: Path) -> None:
    first = {"long": nn.Parameter(torch.zeros(3, 5)), "short": nn.Parameter(torch.zeros(5, 2))}
    optimizer = _adamw(first)
    for parameter in first.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    _save(optimizer, tmp_path)
    second = {name: nn.Parameter(first[name].detach().clone()) for name in ("short", "long")}
    other = _adamw(second)

    join_state(other, *_load(tmp_path))

    for name, parameter in second.items():
        assert torch.equal(other.state[parameter]["exp_avg"], optimizer.state[first[name]]["exp_avg"])
    assert other.param_groups[0]["param_names"] == ["short", "long"]


def test_options_come_back_or_stay_as_configured(tmp_path: Path) -> None:
    _, optimizer = _started(OptimizerType.muonclip, steps=2)
    apply_schedule(optimizer, 0.25)
    _save(optimizer, tmp_path)
    kept, changed = (build_optimizer(tiny_llama(), _config(OptimizerType.muonclip)) for _ in range(2))
    for group in kept.param_groups:
        group["lr"] = group["initial_lr"] = 7.0

    join_state(changed, *_load(tmp_path))
    join_state(kept, *_load(tmp_path), with_options=False)

    assert [group["lr"] for group in changed.param_groups] == [0.25 * 0.02, 0.25 * 1e-3, 0.25 * 1e-3]
    assert [group["lr"] for group in kept.param_groups] == [7.0] * 3
    _assert_equal(split_state(kept)[0], split_state(changed)[0])


def test_joined_state_does_not_share_memory_with_what_it_came_from() -> None:
    _, optimizer = _started(OptimizerType.adamw, steps=1)
    other = build_optimizer(tiny_llama(), _config(OptimizerType.adamw))
    tensors, rest = split_state(optimizer)

    join_state(other, tensors, rest)
    for value in tensors.values():
        value.fill_(3.0)

    assert not any((state["exp_avg"] == 3).any() for state in other.state.values())


@pytest.mark.parametrize(
    ("saved", "text"),
    [
        (OptimizerConfig(type=OptimizerType.adamw), "groups adam, adam_no_decay instead of muon"),
        (OptimizerConfig(), "group muon differs in 7 parameters, among them model.layers.2"),
    ],
)
def test_the_state_of_another_optimizer_or_model_is_refused(
    saved: OptimizerConfig, text: str, tmp_path: Path
) -> None:
    is_adamw = saved.type is OptimizerType.adamw
    model: PreTrainedModel = tiny_llama() if is_adamw else tiny_mistral(tie_word_embeddings=True)
    _save(build_optimizer(model, saved), tmp_path)

    with pytest.raises(UserError, match=text) as refused:
        join_state(build_optimizer(tiny_llama(), OptimizerConfig()), *_load(tmp_path))

    assert refused.value.exit_code == ExitCode.BAD_DATA


def test_state_of_a_parameter_that_is_not_there_is_refused() -> None:
    _, optimizer = _started(OptimizerType.adamw, steps=1)
    tensors, rest = split_state(optimizer)

    with pytest.raises(UserError, match=r"state of model\.ghost\.weight"):
        join_state(optimizer, {**tensors, "model.ghost.weight/exp_avg": torch.zeros(2)}, rest)


def test_shared_tensors_and_foreign_dtypes_come_back_as_they_were(tmp_path: Path) -> None:
    # What 8-bit optimizers keep: codes, one code book for all, a count.
    book = torch.linspace(-1, 1, 256)
    parameters = {"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.zeros(2, 2))}
    optimizer, other = _adamw(parameters), _adamw(parameters)
    for parameter in parameters.values():
        codes = torch.ones_like(parameter, dtype=torch.uint8)
        optimizer.state[parameter] = {"step": 4, "book": book, "codes": codes, "bound": codes.double()}

    _save(optimizer, tmp_path)
    join_state(other, *_load(tmp_path))

    assert set(_load(tmp_path)[0]) == {"a/book", "a/codes", "a/bound", "b/codes", "b/bound"}
    _assert_equal(dict(other.state), dict(optimizer.state))


def _config(kind: OptimizerType) -> OptimizerConfig:
    return OptimizerConfig(type=kind, lr_muon=0.02, lr_adam=1e-3, weight_decay=0.1)


def _started(kind: OptimizerType, *, steps: int) -> tuple[PreTrainedModel, Optimizer]:
    model = tiny_llama()
    optimizer = build_optimizer(model, _config(kind))
    for step in range(steps):
        _step(model, optimizer, step)
    return model, optimizer


def _step(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    apply_schedule(optimizer, 1 / (step + 1))
    optimizer.step()


def _adamw(parameters: dict[str, nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW([{"params": list(parameters.items()), "name": "all"}])


def _save(optimizer: Optimizer, directory: Path) -> None:
    tensors, rest = split_state(optimizer)
    save_file(tensors, directory / "state.safetensors")
    (directory / "state.json").write_text(json.dumps(rest, allow_nan=False))


def _load(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(directory / "state.safetensors"), json.loads((directory / "state.json").read_text())


def _assert_equal(found: Any, expected: Any) -> None:
    """Equal to the bit, with the same types."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            _assert_equal(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for mine, other in zip(found, expected, strict=True):
            _assert_equal(mine, other)
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected
