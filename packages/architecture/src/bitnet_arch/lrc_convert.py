"""Give the ternary layers of a model a low-rank correction each, in place.

The calibrated start goes through the model decoder layer by decoder layer: inputs are collected for the
projections of one, these are corrected, and the next one sees what the corrected model feeds it. Memory is
three [K, K] float64 sums per projection of one decoder layer, whatever the number of tokens.

Shapes: K in_features of a projection.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_arch.bitlinear import BitLinear
from bitnet_arch.calibration_batches import Batch, evaluating, model_inputs, token_rows
from bitnet_arch.finite import refuse_unusable_tensors
from bitnet_arch.lrc import BitLinearLRC, LRCInit, chosen_rank
from bitnet_arch.lrc_solve import InputStatistics, solve
from bitnet_arch.quant import dequantize_activations, quantize_activations
from bitnet_arch.sparsity import sparsify
from durable import ExitCode, UserError


def convert_bitlinear_to_lrc(
    module: nn.Module,
    rank: int | None = None,
    rank_percentage: float = 0.1,
    init_method: str = LRCInit.svd,
    exclude_names: Iterable[str] | None = None,
    *,
    bytes_share: float | None = None,
    lrc_dtype: torch.dtype | None = None,
    batches: Iterable[Batch] | None = None,
    rounds: int = 0,
) -> nn.Module:
    """Replace every `BitLinear` in `module` by a `BitLinearLRC` over the same weight; return the module.

    The rank is `rank` (a layer too small for it takes its full rank), else what `bytes_share` of the ternary
    bytes buys, else `rank_percentage` of the full rank. U and V are stored as `lrc_dtype`, by default the
    dtype of the weight. Modules named in `exclude_names` are left alone with all they hold.

    `init_method="calibrated"` needs `batches`. Each of its `rounds` also looks for better codes, and writes
    the weights that have them; for models that were never trained as ternary ones.
    """
    init = _checked_init(init_method, batches, rounds)
    targets = _targets(module, tuple(exclude_names or ()))
    refuse_unusable_tensors(module.state_dict(), action="correct")
    ranks = {
        path: _rank_of(layer, path, rank, rank_percentage, bytes_share, lrc_dtype)
        for path, layer in targets.items()
    }
    batches = list(batches or ())
    made: dict[int, BitLinearLRC] = {}
    for group in _decoder_layers(targets):
        layers = {path: targets[path] for path in group}
        statistics = _collect(module, layers, batches) if init is LRCInit.calibrated else {}
        for path, source in layers.items():
            if id(source) not in made:
                layer = BitLinearLRC.from_bitlinear(source, rank=ranks[path], lrc_dtype=lrc_dtype)
                _start(layer, init, statistics.get(path), rounds)
                made[id(source)] = layer
            module = _replaced(module, path, made[id(source)])
    return module


@torch.no_grad()
def _start(layer: BitLinearLRC, init: LRCInit, statistics: InputStatistics | None, rounds: int) -> None:
    if statistics is None:
        layer.init_factors(init)
        return
    fit = solve(layer.weight, statistics.damped(), layer.rank, rounds=rounds)
    layer.set_factors(fit.U, fit.V)
    if fit.weight is not layer.weight:
        layer.weight.copy_(fit.weight)


def _checked_init(init_method: str, batches: Iterable[Batch] | None, rounds: int) -> LRCInit:
    try:
        init = LRCInit(init_method)
    except ValueError:
        raise UserError(
            "lrc.init_method: unknown start for U and V", init_method, choices=list(LRCInit)
        ) from None
    if init is LRCInit.calibrated and batches is None:
        raise UserError("lrc.init_method: calibrated needs batches", "none", "pass batches, or use svd")
    if init is not LRCInit.calibrated and (batches is not None or rounds):
        raise UserError(
            "lrc.init_method: only calibrated uses batches and rounds", init, "use calibrated, or drop them"
        )
    if rounds < 0:
        raise UserError("lrc.rounds: cannot be negative", rounds, "give 0 or more")
    return init


def _targets(module: nn.Module, exclude_names: tuple[str, ...]) -> dict[str, BitLinear]:
    modules = dict(module.named_modules(remove_duplicate=False))
    names = {part for path in modules for part in path.split(".")}
    for name in exclude_names:
        if name not in names:
            raise UserError("lrc.exclude_names: no module has this name", name, choices=sorted(names - {""}))
    targets = {
        path: layer
        for path, layer in modules.items()
        if isinstance(layer, BitLinear)
        and not isinstance(layer, BitLinearLRC)
        and not set(path.split(".")) & set(exclude_names)
    }
    if not targets:
        corrected = sum(isinstance(layer, BitLinearLRC) for layer in modules.values())
        raise UserError(
            f"{type(module).__name__} has no ternary layer left to correct",
            f"{corrected} layers that are corrected already" if corrected else "no BitLinear",
            "use the model as it is" if corrected else "convert the model to ternary first, or exclude less",
        )
    return targets


def _rank_of(
    layer: BitLinear,
    path: str,
    rank: int | None,
    rank_percentage: float,
    bytes_share: float | None,
    lrc_dtype: torch.dtype | None,
) -> int:
    full = min(layer.in_features, layer.out_features)
    return chosen_rank(
        layer.in_features,
        layer.out_features,
        rank=rank if rank is None else min(rank, full),
        rank_percentage=rank_percentage,
        bytes_share=bytes_share,
        bytes_per_element=(lrc_dtype or layer.weight.dtype).itemsize,
    )


def _decoder_layers(paths: Iterable[str]) -> list[list[str]]:
    """Paths in the order of the model, those under the same first number together."""

    def place(path: str) -> str:
        numbered = re.match(r"(.*?\b\d+)(\.|$)", path)
        return numbered[1] if numbered else path

    return [list(group) for _, group in groupby(paths, key=place)]


def _replaced(module: nn.Module, path: str, layer: BitLinearLRC) -> nn.Module:
    if not path:
        return layer
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, layer)
    return module


class _AllSeenError(Exception):
    """Every layer of interest has had its input: the rest of the forward is of no use."""


def _collect(
    model: nn.Module, layers: Mapping[str, BitLinear], batches: Sequence[Batch]
) -> dict[str, InputStatistics]:
    """Run the model as it stands and add up what reaches each layer."""
    statistics = {
        path: InputStatistics.empty(layer.in_features, layer.weight.device) for path, layer in layers.items()
    }
    with torch.no_grad(), evaluating(model):
        for batch in batches:
            inputs = model_inputs(batch, model)
            waiting = set(layers)
            with ExitStack() as hooks:
                for path, layer in layers.items():
                    record = _recorder(path, statistics[path], waiting, inputs.get("attention_mask"))
                    hooks.callback(layer.register_forward_pre_hook(record).remove)
                with suppress(_AllSeenError):
                    model(**inputs)
    for path, sums in statistics.items():
        _check(path, sums)
    return statistics


def _recorder(
    path: str, statistics: InputStatistics, waiting: set[str], mask_BT: Tensor | None
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def record(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(layer, BitLinear)
        x = layer.normalized(inputs[0])
        y = sparsify(x, layer.sparsity)
        if layer.quantizes_activations:
            y = dequantize_activations(*quantize_activations(y))
        statistics.add(token_rows(x, mask_BT), token_rows(y, mask_BT))
        waiting.discard(path)
        if not waiting:
            raise _AllSeenError

    return record


def _check(path: str, statistics: InputStatistics) -> None:
    if statistics.num_tokens == 0:
        raise UserError(
            f"lrc.batches: no token of them reached {path}",
            "no token",
            "pass batches as a list, with tokens that are not padding, or exclude this layer",
        )
    if not bool(torch.isfinite(statistics.xx.sum() + statistics.xy.sum() + statistics.yy.sum())):
        raise UserError(
            f"The input of {path} is not finite on the calibration batches",
            "NaN or Inf",
            "check the model's weights, or calibrate in float32",
            ExitCode.BAD_DATA,
        )
