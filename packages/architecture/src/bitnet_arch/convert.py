"""Turn a pretrained decoder into a ternary one, in place (BitNet b1.58, arXiv 2402.17764; SubLN: arXiv
2510.13998).

    embedding ─► layers ─► norm ─► head       a layer:  norm ─► q k v ─► attention ─► [SubLN] ─► o ─► +
                                                        norm ─► gate up ─► product ─► [SubLN] ─► down ─► +
                                                                └──────── each a BitLinear ─────────┘

Every weight stays the very `Parameter` it was, with its dtype and device; embedding, norms and head are not
touched. A sub-norm that the architecture has of its own (BitNetForCausalLM) moves into the projection that
it feeds, so no projection is ever normed twice. Nothing is changed before everything has been checked.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from bitnet_arch.bitlinear import BitLinear
from bitnet_arch.conversion_config import ConversionConfig, HiddenAct, SubLNInit, SubLNPlacement
from bitnet_arch.finite import refuse_unusable_tensors
from bitnet_arch.subln import SubLN
from bitnet_arch.subln_calibration import subln_gains
from bitnet_arch.walk import ModelWalk, config_of, linear_at, walk
from durable import ExitCode, UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """What a conversion did, by name."""

    family: str
    converted: tuple[str, ...]
    skipped: dict[str, str]
    """Projection left dense → why."""
    kept: tuple[str, ...]
    """Modules with parameters that are never converted: embedding, norms, head."""
    subln_inserted: tuple[str, ...]
    """Projections with a new SubLN."""
    subln_adopted: dict[str, str]
    """Projection → path of the architecture's own sub-norm that now lives in it."""
    hidden_act: str
    parameters: int
    ternary_parameters: int
    dense_bytes: int
    """All parameters as they are stored now."""
    packed_bytes: int
    """The same with converted weights at two bits, and an fp32 scale each."""

    def __str__(self) -> str:
        share = self.ternary_parameters / self.parameters
        parts = [
            f"{self.family}: {len(self.converted)} projections ternary, "
            f"{share:.1%} of {self.parameters:,} parameters",
            f"{self.dense_bytes / 1e6:.1f} MB dense, {self.packed_bytes / 1e6:.1f} MB packed",
        ]
        if self.subln_inserted:
            parts.append(f"{len(self.subln_inserted)} SubLN inserted")
        if self.subln_adopted:
            parts.append(f"{len(self.subln_adopted)} sub-norms adopted")
        if self.skipped:
            parts.append("left dense: " + ", ".join(f"{name} ({why})" for name, why in self.skipped.items()))
        return "; ".join(parts)


def convert_to_bitnet(model: nn.Module, config: ConversionConfig | None = None) -> ConversionReport:
    """Replace the projections of a decoder by ternary ones, in place."""
    config = config or ConversionConfig()
    walked = walk(model)
    refuse_converted(model, walked.projections)
    skipped = excluded_projections(model, walked, config.exclude)
    targets = tuple(path for path in walked.projections if path not in skipped)
    if not targets:
        raise UserError(
            "exclude: nothing is left to convert",
            found=f"patterns that cover all {len(walked.projections)} projections",
            fix="narrow the patterns",
            exit_code=ExitCode.BAD_INPUT,
        )
    refuse_unusable_tensors(model.state_dict(), action="convert")
    adopted = {path: norm for path, norm in walked.sub_norms.items() if path in targets}
    inserted = _subln_targets(walked, targets, adopted, config)

    activations = _set_hidden_act(model, walked, config)
    try:
        gains = _initial_gains(model, inserted, config)
    except BaseException:
        _restore_hidden_act(model, walked, activations)
        raise
    for path in targets:
        _convert_projection(model, path, adopted.get(path), config, walked)
    for path, gain in gains.items():
        _insert_subln(model, path, gain, config, walked)
    _forget_load_quantization(model)
    return _report(model, walked, targets, skipped, inserted, adopted)


def refuse_converted(model: nn.Module, projections: Iterable[str]) -> None:
    """Only plain `nn.Linear` with floating-point weights is converted: a subclass means something."""
    modules = {path: linear_at(model, path) for path in projections}
    # By name, because transformers has ternary layers too.
    ternary = [m for m in modules.values() if any("BitLinear" in base.__name__ for base in type(m).__mro__)]
    if ternary:
        raise UserError(
            f"{type(model).__name__} is already converted",
            found=f"{len(ternary)} of {len(modules)} projections are {type(ternary[0]).__name__}",
            fix="use the model as it is; load_bitnet opens a saved one",
            exit_code=ExitCode.BAD_INPUT,
        )
    for path, module in modules.items():
        if type(module) is not nn.Linear or not module.weight.is_floating_point():
            raise UserError(
                f"{path}: cannot be converted",
                found=f"{type(module).__name__} with {module.weight.dtype} weights",
                fix="load the model in full precision, without other quantisation or adapters",
                exit_code=ExitCode.BAD_INPUT,
            )


def excluded_projections(model: nn.Module, walked: ModelWalk, patterns: Iterable[str]) -> dict[str, str]:
    """Projections that a pattern covers, by name or through a module above them → why. A pattern must name
    something.
    """
    skipped: dict[str, str] = {}
    never_converted = [name for name, _ in model.named_modules() if not name.startswith("model.layers.")]
    for pattern in patterns:
        hits = [
            path
            for path in walked.projections
            if any(_matches(name, pattern) for name in _with_parents(path))
        ]
        if not hits and not any(_matches(name, pattern) for name in never_converted):
            leaf_names = sorted({path.rpartition(".")[2] for path in walked.projections})
            raise UserError(
                "exclude: the pattern matches no module",
                found=pattern,
                fix="use a projection's name, the end of a module's path, or a glob such as layers.0.*",
                exit_code=ExitCode.BAD_INPUT,
                choices=[*leaf_names, *walked.projections],
            )
        skipped |= dict.fromkeys(hits, f"excluded by {pattern}")
    return skipped


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _with_parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _subln_targets(
    walked: ModelWalk, targets: tuple[str, ...], adopted: Mapping[str, str], config: ConversionConfig
) -> tuple[str, ...]:
    match SubLNPlacement(config.subln):
        case SubLNPlacement.none:
            wanted: tuple[str, ...] = ()
        case SubLNPlacement.output:
            wanted = walked.output_projections
        case SubLNPlacement.all:
            wanted = walked.projections
    return tuple(path for path in wanted if path in targets and path not in adopted)


def _set_hidden_act(model: nn.Module, walked: ModelWalk, config: ConversionConfig) -> list[nn.Module]:
    """Change the activation where asked; returns what was there."""
    previous = [model.get_submodule(f"{layer.mlp}.act_fn") for layer in walked.layers]
    if config.hidden_act == HiddenAct.relu2:
        for layer in walked.layers:
            model.set_submodule(f"{layer.mlp}.act_fn", ACT2FN[HiddenAct.relu2])
        setattr(config_of(model), walked.activation_field, HiddenAct.relu2.value)
    return previous


def _restore_hidden_act(model: nn.Module, walked: ModelWalk, activations: list[nn.Module]) -> None:
    for layer, activation in zip(walked.layers, activations, strict=True):
        model.set_submodule(f"{layer.mlp}.act_fn", activation)
    setattr(config_of(model), walked.activation_field, walked.activation)


def _initial_gains(
    model: nn.Module, inserted: tuple[str, ...], config: ConversionConfig
) -> dict[str, Tensor | None]:
    if config.subln_init == SubLNInit.ones or not inserted:
        return dict.fromkeys(inserted)
    assert config.calibration_batches is not None
    return dict(subln_gains(model, inserted, config.calibration_batches))


def _convert_projection(
    model: nn.Module, path: str, own_norm: str | None, config: ConversionConfig, walked: ModelWalk
) -> None:
    layer = BitLinear.from_linear(linear_at(model, path))
    if own_norm is not None:
        layer.input_norm = adopt_norm(model, own_norm, eps=walked.rms_norm_eps)
    model.set_submodule(path, layer)


def adopt_norm(model: nn.Module, path: str, *, eps: float) -> SubLN:
    """Take an architecture's own RMSNorm out of the model, with its very gain; an identity stays in its
    place.
    """
    norm = model.get_submodule(path)
    assert isinstance(norm.weight, nn.Parameter)
    subln = SubLN(norm.weight.shape[0], eps=eps, device="meta")
    subln.weight = norm.weight
    subln.is_own = True
    model.set_submodule(path, nn.Identity())
    return subln


def _insert_subln(
    model: nn.Module, path: str, gain: Tensor | None, config: ConversionConfig, walked: ModelWalk
) -> None:
    layer = model.get_submodule(path)
    assert isinstance(layer, BitLinear)
    weight = layer.weight
    subln = SubLN(layer.in_features, eps=walked.rms_norm_eps, device=weight.device, dtype=weight.dtype)
    if gain is not None:
        assert subln.weight is not None
        with torch.no_grad():
            subln.weight.copy_(gain)
    layer.input_norm = subln.train(layer.training)
    layer.subln_amount = float(config.subln_amount)


def _forget_load_quantization(model: nn.Module) -> None:
    """A model read from GGUF is marked as quantised, which its plain weights are not; transformers would
    refuse to save it.
    """
    quantizer = model.__dict__.pop("hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    config_of(model).__dict__.pop("_is_quantized", None)


def _report(
    model: nn.Module,
    walked: ModelWalk,
    targets: tuple[str, ...],
    skipped: dict[str, str],
    inserted: tuple[str, ...],
    adopted: dict[str, str],
) -> ConversionReport:
    ternary = [linear_at(model, path).weight for path in targets]
    parameters = list(model.parameters())
    dense_bytes = sum(parameter.nbytes for parameter in parameters)
    kept = [
        name
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
        and name not in walked.projections
        and not name.endswith(".input_norm")
    ]
    return ConversionReport(
        family=walked.family,
        converted=targets,
        skipped=skipped,
        kept=tuple(kept),
        subln_inserted=inserted,
        subln_adopted=adopted,
        hidden_act=str(getattr(config_of(model), walked.activation_field)),
        parameters=sum(parameter.numel() for parameter in parameters),
        ternary_parameters=sum(weight.numel() for weight in ternary),
        dense_bytes=dense_bytes,
        packed_bytes=dense_bytes - sum(weight.nbytes - (weight.numel() + 3) // 4 - 4 for weight in ternary),
    )
