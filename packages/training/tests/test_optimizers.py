"""Which parameter goes where, which optimizer is built, and what its settings refuse."""

import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from bitnet_arch import (
    BitLinear,
    ConversionConfig,
    SubLN,
    convert_bitlinear_to_lrc,
    convert_to_bitnet,
    freeze_model_except_lrc,
)
from bitnet_arch.testing import TINY_MODELS, tiny_llama, tiny_mistral, tiny_qwen2
from durable import UserError
from wrinklefree.optimizers.build import build_optimizer
from wrinklefree.optimizers.config import (
    GradientClippingConfig,
    OptimizerConfig,
    OptimizerType,
    SchedulerConfig,
    ZClipConfig,
)
from wrinklefree.optimizers.groups import parameter_groups
from wrinklefree.optimizers.muonclip import MuonClip


@pytest.mark.parametrize("family", TINY_MODELS)
def test_every_parameter_goes_where_its_module_and_dimensions_say(family: str) -> None:
    model = TINY_MODELS[family]()
    convert_to_bitnet(model, ConversionConfig(subln="all"))

    found = {name: group for group, names in _names(model).items() for name in names}

    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if isinstance(module, BitLinear) and own == "weight":
                expected = "muon"
            else:
                is_matrix = isinstance(module, (nn.Embedding, nn.Linear)) and own == "weight"
                expected = "adam" if is_matrix else "adam_no_decay"
            name = f"{path}.{own}"
            if name == "lm_head.weight" and parameter is model.get_input_embeddings().weight:
                assert name not in found
            else:
                assert found.pop(name) == expected, name
    assert not found


def test_sub_norms_and_biases_do_not_decay_whatever_they_are_called() -> None:
    model = tiny_qwen2()
    convert_to_bitnet(model, ConversionConfig(subln="output"))
    optimizer = build_optimizer(model, OptimizerConfig(type=OptimizerType.adamw, weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}

    norms = [module for module in model.modules() if isinstance(module, SubLN)]
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]

    assert len(norms) == 4
    assert len(biases) == 6
    assert {decay[id(p)] for norm in norms for p in norm.parameters()} == {0.0}
    assert {decay[id(bias)] for bias in biases} == {0.0}
    assert decay[id(model.get_input_embeddings().weight)] == 0.1


@pytest.mark.parametrize(("build", "num_ends"), [(tiny_llama, 1), (tiny_mistral, 2)])
def test_a_tied_head_is_moved_once(build: Callable[[], PreTrainedModel], num_ends: int) -> None:
    model = build()
    optimizer = build_optimizer(model, OptimizerConfig())

    moved = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    ends = [
        name for group in optimizer.param_groups if group["name"] == "adam" for name in group["param_names"]
    ]

    assert sorted(moved) == sorted({id(parameter) for parameter in model.parameters()})
    assert len(ends) == num_ends


def test_low_rank_factors_go_to_adam_and_frozen_weights_nowhere() -> None:
    model = tiny_llama()
    convert_to_bitnet(model)
    convert_bitlinear_to_lrc(model, rank=2)
    freeze_model_except_lrc(model)

    names = _names(model)

    assert list(names) == ["adam"]
    assert len(names["adam"]) == 2 * 7 * 2
    assert all(name.endswith(("lrc_U", "lrc_V")) for name in names["adam"])


def test_a_model_with_nothing_to_train_is_refused() -> None:
    model = tiny_llama()
    model.requires_grad_(False)

    with pytest.raises(UserError, match="LlamaForCausalLM has no parameter to train"):
        build_optimizer(model, OptimizerConfig())


def test_groups_have_peaks_decay_and_the_order_of_the_model() -> None:
    config = OptimizerConfig(lr_muon=0.02, lr_adam=3e-4, weight_decay=0.1, momentum=0.9)
    optimizer = build_optimizer(tiny_llama(), config)

    rows = [(g["name"], g["lr"], g["initial_lr"], g["weight_decay"]) for g in optimizer.param_groups]
    names = [name for name, _ in tiny_llama().named_parameters()]

    assert isinstance(optimizer, MuonClip)
    assert rows == [
        ("muon", 0.02, 0.02, 0.1),
        ("adam", 3e-4, 3e-4, 0.1),
        ("adam_no_decay", 3e-4, 3e-4, 0.0),
    ]
    assert optimizer.param_groups[0]["momentum"] == 0.9
    for group in optimizer.param_groups:
        assert group["param_names"] == [name for name in names if name in group["param_names"]]


@pytest.mark.parametrize(("lr", "expected"), [(None, 5e-5), (2e-3, 2e-3)])
def test_adamw_takes_its_learning_rate_or_that_of_adam(lr: float | None, expected: float) -> None:
    config = OptimizerConfig(type=OptimizerType.adamw, lr=lr, adam_betas=[0.8, 0.99], adam_eps=1e-6)

    optimizer = build_optimizer(tiny_llama(), config)

    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group["lr"], list(group["betas"]), group["eps"]) == (expected, [0.8, 0.99], 1e-6)
        assert group["fused"]


@pytest.mark.parametrize("kind", [OptimizerType.muonclip, OptimizerType.adamw])
def test_an_optimizer_is_built_over_a_model_without_storage(kind: OptimizerType) -> None:
    with torch.device("meta"):
        model = tiny_llama()

    assert build_optimizer(model, OptimizerConfig(type=kind)).param_groups


def test_the_backend_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="wrinklefree"):
        build_optimizer(tiny_llama(), OptimizerConfig())

    assert "muonclip (torch; not muon_fsdp2: parameters are not sharded)" in caplog.text
    # Two layers of q, k, v, o and of gate, up, down.
    assert f"muon {2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 176 * 64):,} at lr 0.005" in caplog.text


def test_adamw_8bit_without_bitsandbytes_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    # None in sys.modules is how Python marks a package that cannot be imported.
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)

    with pytest.raises(UserError, match=r"needs the package bitsandbytes.*install bitsandbytes"):
        build_optimizer(tiny_llama(), OptimizerConfig(type=OptimizerType.adamw_8bit))


@pytest.mark.parametrize(
    ("kind", "settings", "text"),
    [
        (
            OptimizerConfig,
            {"type": "muonclp"},
            "training.optimizer.type: no such choice .*did you mean 'muonclip'",
        ),
        (OptimizerConfig, {"lr": 1e-3}, "training.optimizer.lr: muonclip has two learning rates"),
        (OptimizerConfig, {"lr_muon": float("nan")}, "training.optimizer.lr_muon: out of range"),
        (OptimizerConfig, {"lr_adam": -1.0}, "training.optimizer.lr_adam: out of range"),
        (OptimizerConfig, {"weight_decay": float("inf")}, "training.optimizer.weight_decay: out of range"),
        (OptimizerConfig, {"weight_decay_final": -0.1}, "training.optimizer.weight_decay_final"),
        (OptimizerConfig, {"weight_decay_switch": 1.1}, "training.optimizer.weight_decay_switch"),
        (OptimizerConfig, {"momentum": 1.0}, "training.optimizer.momentum"),
        (OptimizerConfig, {"adam_betas": [0.9]}, "training.optimizer.adam_betas.*two numbers"),
        (OptimizerConfig, {"adam_eps": 0.0}, "training.optimizer.adam_eps"),
        (OptimizerConfig, {"clipping_threshold": 0.0}, "training.optimizer.clipping_threshold"),
        (OptimizerConfig, {"clipping_alpha": 2.0}, "training.optimizer.clipping_alpha"),
        (SchedulerConfig, {"type": "wds"}, "training.scheduler.type: .*did you mean 'wsd'"),
        (SchedulerConfig, {"decay_type": "steps"}, "training.scheduler.decay_type"),
        (SchedulerConfig, {"warmup_steps": -1}, "training.scheduler.warmup_steps"),
        (SchedulerConfig, {"warmup_limit_steps": -1}, "training.scheduler.warmup_limit_steps"),
        (SchedulerConfig, {"warmup_share": 1.5}, "training.scheduler.warmup_share"),
        (SchedulerConfig, {"min_lr_ratio": float("nan")}, "training.scheduler.min_lr_ratio"),
        (SchedulerConfig, {"decay_ratio": -0.1}, "training.scheduler.decay_ratio"),
        (GradientClippingConfig, {"max_norm": 0.0}, "training.gradient_clipping.max_norm"),
        (ZClipConfig, {"mode": "z"}, "training.gradient_clipping.zclip.mode"),
        (ZClipConfig, {"warmup_steps": 1}, "training.gradient_clipping.zclip.warmup_steps"),
        (ZClipConfig, {"z_threshold": 0.0}, "training.gradient_clipping.zclip.z_threshold"),
        (ZClipConfig, {"ema_decay": 1.0}, "training.gradient_clipping.zclip.ema_decay"),
        (ZClipConfig, {"clip_factor": 0.0}, "training.gradient_clipping.zclip.clip_factor"),
        (ZClipConfig, {"min_limit": -1.0}, "training.gradient_clipping.zclip.min_limit"),
    ],
)
def test_a_setting_that_makes_no_sense_is_one_line_with_its_key(
    kind: Callable[..., object], settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError, match=text):
        kind(**settings)


def _names(model: nn.Module) -> dict[str, list[str]]:
    return {
        group["name"]: [name for name, _ in group["params"]]
        for group in parameter_groups(model, OptimizerConfig())
    }
