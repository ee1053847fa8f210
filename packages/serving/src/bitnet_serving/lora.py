"""Low-rank corrections (LRC, arXiv 2412.07902) as a GGUF LoRA adapter beside the ternary file.

    PyTorch    y = Q(W)·Q(x) + U(Vᵀx)                      x after SubLN, unquantised
    engine     y = W·x + adapter.scale · alpha / r · B(A·x)

So A = Vᵀ and B = U, and alpha is the rank; where projections differ in rank it is the largest, and B takes
r / alpha. Both are padded and their rows put in the engine's order as those of their base. An engine adds the
correction before it multiplies by a `scale` tensor, so the base has its scales in its blocks.

Shapes: U [N, r], V [K, r]; lora_a [r, K], lora_b [N, r].
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bitnet_serving.architectures import Place, places
from bitnet_serving.encoding import encode_dense
from bitnet_serving.file_tensors import FileTensors
from bitnet_serving.formats import GGUF_FORMATS
from bitnet_serving.gguf_values import MetaValue
from bitnet_serving.gguf_writer import TensorToWrite, write_gguf
from bitnet_serving.padding import AXES

FORMAT = "f16"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReport:
    """What was written beside the model."""

    path: Path
    num_corrections: int
    largest_rank: int
    num_bytes: int

    def __str__(self) -> str:
        what = f"{self.num_corrections} low-rank corrections of rank {self.largest_rank} at most"
        size = f"{self.num_bytes / 1e6:,.2f} MB"
        return f"{self.path}: {what}, as a LoRA adapter in {FORMAT}, {size}; engines take it with --lora"


def write_adapter(
    path: str | os.PathLike[str],
    tensors: FileTensors,
    *,
    about: Mapping[str, MetaValue] | None = None,
    replace: bool = False,
) -> AdapterReport:
    """Write the corrections of a checkpoint as an adapter for the file that `tensors` makes."""
    assert not tensors.scale_tensors, "an engine would multiply the correction by the base's scale"
    ranks = tensors.source.record.lrc
    alpha = max(ranks.values())
    metadata: dict[str, MetaValue] = {
        "general.architecture": tensors.architecture.name,
        "general.type": "adapter",
        "general.file_type": 1,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    factors = [
        factor
        for place in places(tensors.source.walked, tensors.source.stored.keys())
        if place.kind == "weight" and place.module in ranks
        for factor in _factors(tensors, place, alpha)
    ]
    write_gguf(path, metadata | dict(about or {}), factors, replace=replace)
    return AdapterReport(
        path=Path(path),
        num_corrections=len(ranks),
        largest_rank=alpha,
        num_bytes=sum(factor.num_bytes for factor in factors),
    )


def _factors(tensors: FileTensors, place: Place, alpha: int) -> Iterator[TensorToWrite]:
    rank = tensors.source.record.lrc[place.module]
    rows, columns = (tensors.padding.padded.width(axis) for axis in AXES[place.role])

    def lora_a() -> Tensor:
        values = tensors.source.dense(f"{place.module}.lrc_V").float().t()
        return encode_dense(FORMAT, tensors.padding.apply(place.role, values.contiguous(), "lora_a"))

    def lora_b() -> Tensor:
        values = tensors.in_order(place, tensors.source.dense(f"{place.module}.lrc_U").float())
        return encode_dense(FORMAT, tensors.padding.apply(place.role, values * (rank / alpha), "lora_b"))

    assert GGUF_FORMATS[FORMAT].block_columns == 1, "a rank is no multiple of a block"
    base = place.gguf_name
    yield TensorToWrite(name=f"{base}.lora_a", format=FORMAT, shape=(rank, columns), produce=lora_a)
    yield TensorToWrite(name=f"{base}.lora_b", format=FORMAT, shape=(rows, rank), produce=lora_b)
