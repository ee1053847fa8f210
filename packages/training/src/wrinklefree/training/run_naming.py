"""Names of runs that say what matters: model, stage, optimizer, learning rate, sequences of a step.

    qwen3_4b-s2-muon-lr2.4e3-bs64-a3f        training
    bn2b-i2s-ctx4096-t16-a3f                 inference: model, weights, context, threads
    bn2b-moe8k2-i2s-ctx4096-t16-a3f          the same with 2 of 8 experts

A learning rate is its digits and the size of its exponent (2.4e-3 is `2.4e3`); one of 1 or more has a plus
sign (`2.4e+3`). The random end keeps two runs of one configuration apart.
"""

import dataclasses
import re
import secrets
from collections.abc import Mapping
from typing import Any

MISSING = "?"
STAGES = {
    "stage1": "s1",
    "subln_insertion": "s1",
    "stage1_9": "s1.9",
    "layerwise_distillation": "s1.9",
    "stage2": "s2",
    "continue_pretrain": "s2",
    "stage3": "s3",
    "distillation": "s3",
    "lrc_calibration": "lrc",
}
OPTIMIZERS = {"muonclip": "muon", "muon": "muon", "adamw": "adam", "adamw_8bit": "ad8b"}


def generate_run_name(config: Any, max_length: int = 64, suffix_length: int = 3) -> str:
    """A name for a training run; `config` is a RunConfig, a Hydra configuration or a plain table."""
    tree = _table(config)
    model = str(_at(tree, "model.name") or MISSING)
    experts, active = _at(tree, "model.num_experts"), _at(tree, "model.top_k")
    moe = [f"moe{experts}k{active}"] if experts and active else []
    stage = str(_at(tree, "training.stage") or MISSING)
    kind = str(_at(tree, "training.optimizer.type") or MISSING)
    batch, cut = _at(tree, "training.batch_size"), _at(tree, "training.gradient_accumulation_steps")
    size = batch * (cut or 1) if isinstance(batch, int) else MISSING
    parts = [
        _word(model),
        *moe,
        STAGES.get(stage, _word(stage)),
        OPTIMIZERS.get(kind, _word(kind)),
        f"lr{_learning_rate(tree, kind)}",
        f"bs{size}",
    ]
    return _with_suffix(parts, max_length, suffix_length)


def generate_benchmark_name(
    model: str, quant: str, ctx: int, threads: int, max_length: int = 64, suffix_length: int = 3
) -> str:
    """A name for a measurement of a dense model."""
    parts = [_short_model(model), _word(quant).replace("_", ""), f"ctx{ctx}", f"t{threads}"]
    return _with_suffix(parts, max_length, suffix_length)


def generate_moe_benchmark_name(
    model: str,
    num_experts: int,
    top_k: int,
    quant: str,
    ctx: int,
    threads: int,
    max_length: int = 64,
    suffix_length: int = 3,
) -> str:
    """A name for a measurement of a model of which `top_k` of `num_experts` are active."""
    parts = [_short_model(model), f"moe{num_experts}k{top_k}", _word(quant).replace("_", "")]
    return _with_suffix([*parts, f"ctx{ctx}", f"t{threads}"], max_length, suffix_length)


def _with_suffix(parts: list[str], max_length: int, suffix_length: int) -> str:
    """The suffix always fits: what is too long loses its end before it."""
    suffix = secrets.token_hex(suffix_length)[:suffix_length]
    body = "-".join(parts)[: max(0, max_length - suffix_length - 1)].rstrip("-")
    return f"{body}-{suffix}" if suffix else body


def _learning_rate(tree: Mapping[str, Any], optimizer: str) -> str:
    """Of the group that the optimizer is named after."""
    names = ("lr_muon", "lr") if optimizer.startswith("muon") else ("lr", "lr_adam")
    found = (_at(tree, f"training.optimizer.{name}") for name in names)
    rate = next((value for value in found if isinstance(value, int | float)), None)
    if rate is None:
        return MISSING
    digits, _, exponent = f"{rate:.6e}".partition("e")
    digits = digits.rstrip("0")
    sign = "+" if int(exponent) >= 0 else ""
    return f"{digits}{'0' * digits.endswith('.')}e{sign}{abs(int(exponent))}"


def _short_model(model: str) -> str:
    """`bitnet-2b` is `bn2b`."""
    return re.sub(r"[-_]", "", _word(model).replace("bitnet", "bn"))


def _word(text: str) -> str:
    """Only what a file name, a shell and W&B take."""
    return re.sub(r"[^\w.?-]+", "", text.rpartition("/")[2].lower())


def _table(config: Any) -> Mapping[str, Any]:
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    assert isinstance(config, Mapping), f"no configuration: {type(config).__name__}"
    return config


def _at(tree: Any, path: str) -> Any:
    for name in path.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree
