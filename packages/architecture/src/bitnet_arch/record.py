"""`bitnet.json`: what the tensors of a checkpoint cannot say about a ternary model.

Which modules are ternary; λ, μ and sparsity of the model, and of modules that differ; where SubLNs are, and
their eps; the ranks of low-rank corrections; what block diffusion needs; ties; how the tensors are laid out;
the versions that wrote them.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bitnet_arch.bitlinear import BitLinear, bitlinears
from bitnet_arch.diffusion import BlockDiffusion, block_diffusion_of
from bitnet_arch.lrc import BitLinearLRC
from bitnet_arch.walk import ModelWalk
from durable import ExitCode, UserError

RECORD_NAME = "bitnet.json"
FORMAT = "bitnet-arch"
FORMAT_VERSION = 1

Layout = Literal["training", "stock"]
SETTINGS = ("quant_amount", "activation_amount", "quantizes_activations", "subln_amount", "sparsity")
"""What may differ from layer to layer, and is stored once for those that agree with the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubLNRecord:
    """Where the norms inside projections are."""

    placement: str
    """none, output, all, or mixed: of the SubLNs that conversion inserted."""
    eps: float | None
    inserted: tuple[str, ...]
    """Projections with a SubLN that conversion inserted."""
    own: dict[str, str]
    """Projection → where the architecture has the norm that moved into it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StockRecord:
    """How the stock layout's tensors differ from the model's own, see `stock`."""

    config: dict[str, Any] | None
    """The model's own configuration, where `config.json` names another class."""
    names: dict[str, str]
    """Name in the file → name in the model, where they differ."""
    added: tuple[str, ...]
    """Tensors that only transformers needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BitnetRecord:
    """The content of `bitnet.json`."""

    layout: Layout
    packed: bool
    """Ternary weights are stored as codes and scale."""
    family: str
    ternary: tuple[str, ...]
    """Paths of the ternary projections, in the order of the model."""
    subln: SubLNRecord
    lrc: dict[str, int]
    """Projection → rank of its low-rank correction."""
    settings: dict[str, Any]
    """Of all ternary projections."""
    exceptions: dict[str, dict[str, Any]]
    """Projection → its settings that differ."""
    ties: dict[str, str]
    """Tensor that is not stored → the stored one that it shares."""
    buffer_dtypes: dict[str, str]
    """Buffer outside the checkpoint → its dtype, where the model was cast after it was built."""
    versions: dict[str, str]
    stock: StockRecord | None = None
    """Of the stock layout only."""
    diffusion: BlockDiffusion | None = None
    """Of models that fill in [MASK]; older files do not have it."""

    def settings_of(self, path: str) -> dict[str, Any]:
        """All settings of one projection."""
        return self.settings | self.exceptions.get(path, {})

    def to_json(self) -> str:
        """The file's text."""
        return (
            json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION} | asdict(self), indent=2) + "\n"
        )


def read_record(directory: Path) -> BitnetRecord:
    """Read `bitnet.json`; UserError when this release cannot."""
    path = directory / RECORD_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        file_version = content["format_version"] if content["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreadable(path, type(error).__name__) from None
    if isinstance(file_version, int) and file_version > FORMAT_VERSION:
        raise UserError(
            f"{path}: this release reads formats up to {FORMAT_VERSION}",
            found=f"format {file_version}",
            fix="upgrade bitnet-arch",
            exit_code=ExitCode.BAD_DATA,
        )
    if file_version != FORMAT_VERSION:
        raise _unreadable(path, f"format {content.get('format')!r} version {file_version!r}")
    try:
        subln = content["subln"]
        content.setdefault("diffusion", None)
        values = {name: content[name] for name in BitnetRecord.__dataclass_fields__}
        values["ternary"] = tuple(values["ternary"])
        values["subln"] = SubLNRecord(**subln | {"inserted": tuple(subln["inserted"])})
        if (stock := values["stock"]) is not None:
            values["stock"] = StockRecord(**stock | {"added": tuple(stock["added"])})
        if (diffusion := values["diffusion"]) is not None:
            values["diffusion"] = BlockDiffusion(**diffusion)
        return BitnetRecord(**values)
    except (KeyError, TypeError) as error:
        raise _unreadable(path, f"{type(error).__name__} {error}") from None


def describe(model: nn.Module, walked: ModelWalk, *, layout: Layout, packed: bool) -> BitnetRecord:
    """The record of a converted model."""
    layers = {
        path: layer
        for path in walked.projections
        if isinstance(layer := model.get_submodule(path), BitLinear)
    }
    if not layers or len(layers) != sum(1 for _ in bitlinears(model)):
        raise UserError(
            f"{type(model).__name__} cannot be saved as a ternary model",
            found="no ternary projection" if not layers else "ternary layers that are no projections",
            fix="convert it with convert_to_bitnet",
            exit_code=ExitCode.BAD_INPUT,
        )
    each = {path: _settings(layer) for path, layer in layers.items()}
    common = {name: _most_common(settings[name] for settings in each.values()) for name in SETTINGS}
    different = {
        path: {k: v for k, v in settings.items() if v != common[k]} for path, settings in each.items()
    }
    return BitnetRecord(
        layout=layout,
        packed=packed,
        family=walked.family,
        ternary=tuple(layers),
        subln=_subln_record(layers, walked),
        lrc={path: layer.rank for path, layer in layers.items() if isinstance(layer, BitLinearLRC)},
        settings=common,
        exceptions={path: settings for path, settings in different.items() if settings},
        ties=_ties(model),
        buffer_dtypes=_buffer_dtypes(model),
        versions=_versions(),
        diffusion=block_diffusion_of(model),
    )


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("bitnet-arch", "torch", "transformers")}


def _settings(layer: BitLinear) -> dict[str, Any]:
    settings = {name: getattr(layer, name) for name in SETTINGS}
    if layer.input_norm is None:
        settings["subln_amount"] = 1.0
    settings["sparsity"] = None if layer.sparsity is None else asdict(layer.sparsity)
    return settings


def _most_common(values: Iterable[Any]) -> Any:
    counted = Counter(json.dumps(value) for value in values)
    return json.loads(counted.most_common(1)[0][0])


def _subln_record(layers: Mapping[str, BitLinear], walked: ModelWalk) -> SubLNRecord:
    norms = {path: layer.input_norm for path, layer in layers.items() if layer.input_norm is not None}
    inserted = tuple(path for path, norm in norms.items() if not norm.is_own)
    eps = {norm.eps for norm in norms.values()}
    if len(eps) > 1:
        raise UserError(
            "SubLNs with different eps cannot be saved",
            found=", ".join(str(value) for value in sorted(eps)),
            fix="give all of them the model's rms_norm_eps",
            exit_code=ExitCode.BAD_INPUT,
        )
    return SubLNRecord(
        placement=_placement(inserted, layers, walked),
        eps=next(iter(eps), None),
        inserted=inserted,
        own={path: walked.sub_norms[path] for path, norm in norms.items() if norm.is_own},
    )


def _placement(inserted: tuple[str, ...], layers: Mapping[str, BitLinear], walked: ModelWalk) -> str:
    without_own = [
        path for path, layer in layers.items() if layer.input_norm is None or not layer.input_norm.is_own
    ]
    outputs = [path for path in without_own if path in walked.output_projections]
    for name, places in (("none", []), ("output", outputs), ("all", without_own)):
        if list(inserted) == places:
            return name
    return "mixed"


def _ties(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            ties[name] = first[id(parameter)]
    return ties


def _buffer_dtypes(model: nn.Module) -> dict[str, str]:
    """`model.bfloat16()` also casts the rotary frequencies, which a fresh model has in fp32."""
    stored = model.state_dict().keys()
    return {
        name: str(buffer.dtype).removeprefix("torch.")
        for name, buffer in model.named_buffers()
        if name not in stored and buffer.is_floating_point() and buffer.dtype != torch.float32
    }


def _unreadable(path: Path, found: str) -> UserError:
    return UserError(
        f"{path}: not a record that this release can read",
        found=found,
        fix="save the model again with save_bitnet",
        exit_code=ExitCode.BAD_DATA,
    )
