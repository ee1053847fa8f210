"""Ternary codes and dense values as the data of a tensor in an engine's file, and back.

    tq2_0, tq1_0   per block the codes, then the fp16 scale
    q2_0           per block the fp16 scale, then the codes
    i2_s           all codes, then one fp32 scale and 28 zeros: the x86 layout of Microsoft's engine
    q8_0           per block of 32 values the fp16 scale (largest magnitude / 127), then int8

Codes in a block: `ternary_blocks`. Everything runs in chunks that stay in the cache, and nothing bigger than
a chunk exists beside input and output.

Shapes: codes and values [N, K], M blocks of W weights or B bytes; the data of a tensor is one-dimensional.
"""

import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bitnet_serving.formats import DENSE_FORMATS, TERNARY_FORMATS, BlockFormat
from bitnet_serving.ternary_blocks import TERNARY_BLOCKS, damaged_block
from durable import ExitCode, UserError

CHUNK_WEIGHTS = 2**19
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
I2_S_TAIL_BYTES = TERNARY_FORMATS["i2_s"].tensor_bytes

assert sys.byteorder == "little", "GGUF files are little-endian, and so are the views taken here"


def stored_scale(name: str, scale: float) -> float:
    """The scale that a format keeps of `scale`: fp32 in i2_s, else fp16."""
    dtype = torch.float32 if name == "i2_s" else torch.float16
    return float(torch.tensor(scale, dtype=torch.float64).to(dtype))


def encode_ternary(name: str, codes: Tensor, scale: float) -> Tensor:
    """int8 codes [N, K] in {-1, 0, +1} and their scale as the uint8 data of a tensor."""
    form, block = TERNARY_FORMATS[name], TERNARY_BLOCKS[name]
    assert codes.dtype == torch.int8, codes.dtype
    assert form.holds(*codes.shape), (name, codes.shape)
    kept = torch.tensor([stored_scale(name, scale)])
    if not 0 < kept < float("inf"):
        raise UserError(
            f"{name}: cannot keep this scale",
            found=scale,
            fix="export as f16 or f32, or keep the scale apart",
        )
    data = torch.empty(form.num_bytes(*codes.shape), dtype=torch.uint8)
    blocks_MB = _blocks_of(form, data)
    for codes_MW, chunk_MB in _chunks(codes.contiguous().view(-1, form.block_columns), blocks_MB):
        _require_ternary(codes_MW)
        block.encode(codes_MW, chunk_MB[:, block.place].view(torch.int8))
        if block.scale_place is not None:
            chunk_MB[:, block.scale_place] = kept.half().view(torch.uint8)
    if block.scale_place is None:
        data[-I2_S_TAIL_BYTES:] = 0
        data[-I2_S_TAIL_BYTES:][:4] = kept.view(torch.uint8)
    return data


def decode_ternary(name: str, data: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The int8 codes [N, K] and the fp32 scales (one a block, in order; i2_s: one) of a tensor's data.

    UserError for bytes that no encoder writes, as for a scale that is no number.
    """
    form, block = TERNARY_FORMATS[name], TERNARY_BLOCKS[name]
    assert data.dtype == torch.uint8, data.dtype
    assert data.numel() == form.num_bytes(rows, columns), (name, data.shape)
    codes = torch.empty(rows, columns, dtype=torch.int8)
    blocks_MB = _blocks_of(form, data)
    for codes_MW, chunk_MB in _chunks(codes.view(-1, form.block_columns), blocks_MB):
        block.decode(chunk_MB[:, block.place], codes_MW)
    if block.scale_place is None:
        scales = data[-I2_S_TAIL_BYTES:][:4].clone().view(torch.float32)
    else:
        scales = blocks_MB[:, block.scale_place].contiguous().view(torch.float16).view(-1).float()
    if not scales.isfinite().all():
        raise damaged_block("a scale that is no number")
    return codes, scales


def encode_dense(name: str, values: Tensor) -> Tensor:
    """Values of any shape as the uint8 data of a tensor, rounded as the engine's own tools round."""
    form = DENSE_FORMATS[name]
    shape = tuple(values.shape)
    assert form.holds_shape(shape), (name, shape)
    data = torch.empty(form.bytes_of_shape(shape), dtype=torch.uint8)
    encode = _encode_q8_0 if name == "q8_0" else partial(_encode_rounded, dtype=_DENSE_DTYPES[name])
    for values_MW, chunk_MB in _chunks(
        values.detach().contiguous().view(-1, form.block_columns), _blocks_of(form, data)
    ):
        encode(values_MW, chunk_MB)
    return data


def decode_dense(name: str, data: Tensor, rows: int, columns: int) -> Tensor:
    """The fp32 values [N, K] of a tensor's data."""
    form = DENSE_FORMATS[name]
    assert data.dtype == torch.uint8, data.dtype
    assert data.numel() == form.num_bytes(rows, columns), (name, data.shape)
    if name != "q8_0":
        return _aligned(data).view(_DENSE_DTYPES[name]).float().view(rows, columns)
    blocks_MB = _blocks_of(form, data)
    scale_M1 = blocks_MB[:, :2].contiguous().view(torch.float16).float()
    return (blocks_MB[:, 2:].view(torch.int8).float() * scale_M1).view(rows, columns)


def _blocks_of(form: BlockFormat, data: Tensor) -> Tensor:
    return data[: data.numel() - form.tensor_bytes].view(-1, form.block_bytes)


def _chunks(weights_MW: Tensor, blocks_MB: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, CHUNK_WEIGHTS // weights_MW.shape[1])
    for begin in range(0, len(weights_MW), size):
        yield weights_MW[begin : begin + size], blocks_MB[begin : begin + size]


def _require_ternary(codes: Tensor) -> None:
    smallest, largest = (each.item() for each in torch.aminmax(codes))
    if smallest < -1 or largest > 1:
        raise UserError(
            "ternary weights: a code other than -1, 0 and 1",
            found=smallest if smallest < -1 else largest,
            fix="copy or save the checkpoint again",
            exit_code=ExitCode.BAD_DATA,
        )


def _encode_rounded(values: Tensor, out_MB: Tensor, *, dtype: torch.dtype) -> None:
    """In the format's own dtype; refuses what would become infinite, or is."""
    out = out_MB.view(-1).view(dtype)
    out.copy_(values.view(-1))
    bits, exponent = _EXPONENTS[dtype]
    # The exponent of infinities and NaN has all bits set; isfinite takes twenty times as long.
    if (out.view(bits) & torch.iinfo(bits).max).amax() >= exponent:
        raise UserError(
            f"{str(dtype).removeprefix('torch.')}: cannot hold these values",
            found=f"a largest magnitude of {values.abs().max().item():g}",
            fix="choose bf16 or f32, or look for what went wrong in training",
            exit_code=ExitCode.BAD_DATA,
        )


def _encode_q8_0(values_MW: Tensor, out_MB: Tensor) -> None:
    values_MW = values_MW.float()
    scale_M1 = values_MW.abs().amax(dim=1, keepdim=True).div_(127)
    scale_bytes_MB = torch.empty(len(scale_M1), 2, dtype=torch.uint8)
    _encode_rounded(scale_M1, scale_bytes_MB, dtype=torch.float16)
    out_MB[:, :2] = scale_bytes_MB
    # A block of zeros, or of so little that its fp16 scale is 0, becomes zeros.
    scaled = values_MW * scale_M1.reciprocal().masked_fill_(scale_M1 < SMALLEST_NORMAL, 0)
    # ggml rounds halves away from zero: to an integer, after adding the largest number below a half. A half
    # itself would carry the largest number below it to 1.
    rounded = scaled.add_(torch.copysign(_BELOW_HALF, scaled)).to(torch.int8)
    out_MB[:, 2:] = rounded.view(torch.uint8)


def _aligned(data: Tensor) -> Tensor:
    """A view as a wider dtype needs an address that the dtype divides."""
    return data.clone() if data.storage_offset() % 4 else data


_EXPONENTS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
}
_DENSE_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_BELOW_HALF = torch.tensor(0.5 - 2**-25)
