"""Ternary codes and dense values as the bytes that an engine reads, and back.

    tq2_0   66 bytes for 256 weights: 64 bytes of codes, then the fp16 scale. In each half, byte m holds the
            weights m, 32+m, 64+m, 96+m, the first in its lowest two bits
    tq1_0   54 bytes for 256 weights: 32 bytes of five weights (m, 32+m, … 128+m), 16 bytes of five
            (160+m, 176+m, …), 4 bytes of four (240+m, 244+m, …), then the fp16 scale. A byte is the first
            256th at or above the base-3 fraction whose digits the weights are, the first weight first
    q2_0    18 bytes for 64 weights: the fp16 scale, then 16 bytes of four neighbours, lowest bits first
    i2_s    32 bytes for 128 weights: byte m holds m, 32+m, 64+m, 96+m, the first in its highest two bits;
            after all of them one fp32 scale and 28 zeros (the x86 layout of Microsoft's engine)
    q8_0    34 bytes for 32 values: the fp16 scale (largest magnitude / 127), then int8

Two bits and base-3 digits hold the code + 1: 0, 1 or 2. Everything runs in chunks that stay in the cache, and
nothing bigger than a chunk exists beside input and output.

Shapes: codes and values [N, K], M blocks of W weights, encoded bytes [M, block bytes]; the data of a tensor
is one-dimensional.
"""

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bitnet_serving.formats import DENSE_FORMATS, TERNARY_FORMATS, BlockFormat
from durable import ExitCode, UserError

CHUNK_WEIGHTS = 2**19
_I2_S_SCALE_BYTES = 32

assert sys.byteorder == "little", "GGUF files are little-endian, and so are the views taken here"


def stored_scale(name: str, scale: float) -> float:
    """The scale that a format keeps of `scale`: fp32 in i2_s, else fp16."""
    dtype = torch.float32 if name == "i2_s" else torch.float16
    return float(torch.tensor(scale, dtype=torch.float64).to(dtype))


def encode_ternary(name: str, codes: Tensor, scale: float) -> Tensor:
    """int8 codes [N, K] in {-1, 0, +1} and their scale as the uint8 data of a tensor."""
    form = TERNARY_FORMATS[name]
    assert codes.dtype == torch.int8, codes.dtype
    assert form.holds(*codes.shape), (name, codes.shape)
    kept = stored_scale(name, scale)
    if not 0 < kept < float("inf"):
        raise UserError(
            f"{name}: cannot keep this scale",
            found=scale,
            fix="export as f16 or f32, or keep the scale apart",
        )
    data = torch.empty(form.num_bytes(*codes.shape), dtype=torch.uint8)
    blocks_MB = _blocks_of(form, data)
    place, encode = _TERNARY_ENCODERS[name]
    scale_bytes = torch.tensor([kept], dtype=torch.float16).view(torch.uint8)
    for codes_MW, chunk_MB in _chunks(codes.contiguous().view(-1, form.block_columns), blocks_MB):
        encode(codes_MW, chunk_MB[:, place].view(torch.int8))
        if name != "i2_s":
            chunk_MB[:, _scale_place(name)] = scale_bytes
    if name == "i2_s":
        data[-_I2_S_SCALE_BYTES:] = 0
        data[-_I2_S_SCALE_BYTES:][:4] = torch.tensor([kept], dtype=torch.float32).view(torch.uint8)
    return data


def decode_ternary(name: str, data: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The int8 codes [N, K] and the fp32 scales (one a block, in order; i2_s: one) of a tensor's data.

    UserError for bytes that no encoder writes: a fourth two-bit code, a scale that is no number.
    """
    form = TERNARY_FORMATS[name]
    assert data.dtype == torch.uint8, data.dtype
    assert data.numel() == form.num_bytes(rows, columns), (name, data.shape)
    codes = torch.empty(rows, columns, dtype=torch.int8)
    blocks_MB = _blocks_of(form, data)
    place, _ = _TERNARY_ENCODERS[name]
    for codes_MW, chunk_MB in _chunks(codes.view(-1, form.block_columns), blocks_MB):
        _TERNARY_DECODERS[name](chunk_MB[:, place], codes_MW)
    if name == "i2_s":
        scales = data[-_I2_S_SCALE_BYTES:][:4].clone().view(torch.float32)
    else:
        scales = blocks_MB[:, _scale_place(name)].contiguous().view(torch.float16).view(-1).float()
    if not scales.isfinite().all():
        raise _damaged(name, "a scale that is no number")
    return codes, scales


def encode_dense(name: str, values: Tensor) -> Tensor:
    """Values of any shape as the uint8 data of a tensor, rounded as the engine's own tools round."""
    form = DENSE_FORMATS[name]
    values = values.detach().contiguous()
    if name != "q8_0":
        return _rounded(name, values).reshape(-1).view(torch.uint8)
    assert form.holds_shape(tuple(values.shape)), (name, values.shape)
    data = torch.empty(form.bytes_of_shape(tuple(values.shape)), dtype=torch.uint8)
    for values_MW, chunk_MB in _chunks(values.view(-1, form.block_columns), _blocks_of(form, data)):
        _encode_q8_0(values_MW.float(), chunk_MB)
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


def _scale_place(name: str) -> slice:
    return slice(0, 2) if name == "q2_0" else slice(-2, None)


def _encode_tq2_0(codes_MW: Tensor, out_MB: Tensor) -> None:
    x = codes_MW.view(-1, 2, 4, 32)
    # Modulo 256, Σ 4ⁿ·(code + 1) = Σ 4ⁿ·code + 85.
    out_MB.copy_(_horner(4, *(x[:, :, n] for n in range(4))).add_(85).view(-1, 64))


def _encode_i2_s(codes_MW: Tensor, out_MB: Tensor) -> None:
    x = codes_MW.view(-1, 4, 32)
    out_MB.copy_(_horner(4, *(x[:, n] for n in reversed(range(4)))).add_(85))


def _encode_q2_0(codes_MW: Tensor, out_MB: Tensor) -> None:
    # Four codes are the bytes of a little-endian word; the product moves them side by side into its highest
    # byte, and no sum below it carries.
    word = (codes_MW + 1).view(torch.int32).mul_(1 << 24 | 1 << 18 | 1 << 12 | 1 << 6)
    out_MB.copy_(word.view(torch.int8)[:, 3::4])


def _encode_tq1_0(codes_MW: Tensor, out_MB: Tensor) -> None:
    for place, weights_in, digits in _TQ1_0_PARTS:
        x = codes_MW[:, weights_in].unflatten(1, (digits, -1))
        out_MB[:, place] = _horner(3, *(x[:, n] for n in reversed(range(digits)))).mul_(3 ** (5 - digits))
    digits_MB = out_MB[:, :52].add(_TQ1_0_BIAS).view(torch.uint8).int()
    # ceil(256·q / 243) for q < 243, with a division by 2²² in place of the one by 243.
    out_MB[:, :52] = digits_MB.mul_(256).add_(242).mul_(17261).bitwise_right_shift_(22).to(torch.int8)


def _horner(base: int, *digits: Tensor) -> Tensor:
    """Σ baseⁿ·digitₙ, modulo 256."""
    first, *rest = reversed(digits)
    total = torch.add(rest[0], first, alpha=base)
    for digit in rest[1:]:
        torch.add(digit, total, alpha=base, out=total)
    return total


def _decode_tq2_0(data_MB: Tensor, out_MW: Tensor) -> None:
    _two_bits("tq2_0", data_MB.unflatten(1, (2, 32)), out_MW.view(-1, 2, 4, 32), shifts=(0, 2, 4, 6))


def _decode_i2_s(data_MB: Tensor, out_MW: Tensor) -> None:
    _two_bits("i2_s", data_MB, out_MW.view(-1, 4, 32), shifts=(6, 4, 2, 0))


def _decode_q2_0(data_MB: Tensor, out_MW: Tensor) -> None:
    _two_bits("q2_0", data_MB, out_MW.view(-1, 16, 4).transpose(1, 2), shifts=(0, 2, 4, 6))


def _two_bits(name: str, data: Tensor, out: Tensor, *, shifts: tuple[int, ...]) -> None:
    """`out` has one more dimension before its last: the four weights of a byte."""
    if (data & (data >> 1) & 0b01010101).any():
        raise _damaged(name, "a two-bit code of 3")
    for n, shift in enumerate(shifts):
        torch.sub((data >> shift) & 3, 1, out=out.select(-2, n).view(torch.uint8))


def _decode_tq1_0(data_MB: Tensor, out_MW: Tensor) -> None:
    known = torch.zeros(256, dtype=torch.bool)
    known[(torch.arange(243) * 256 + 242) // 243] = True
    if not known[data_MB[:, :48].long()].all():
        raise _damaged("tq1_0", "a byte that stands for no five codes")
    known.zero_()[(torch.arange(81) * 3 * 256 + 242) // 243] = True
    if not known[data_MB[:, 48:].long()].all():
        raise _damaged("tq1_0", "a byte that stands for no four codes")
    for place, weights_in, digits in _TQ1_0_PARTS:
        out = out_MW[:, weights_in].unflatten(1, (digits, -1))
        for n in range(digits):
            rest = (data_MB[:, place] * 3**n).short()  # modulo 256
            out[:, n] = (rest.mul_(3) >> 8).sub_(1)


def _rounded(name: str, values: Tensor) -> Tensor:
    """In the format's own dtype; refuses what would become infinite, or is."""
    rounded = values.to(_DENSE_DTYPES[name])
    if not rounded.isfinite().all():
        raise UserError(
            f"{name}: cannot hold these values",
            found=f"a largest magnitude of {values.abs().max().item():g}",
            fix="choose bf16 or f32, or look for what went wrong in training",
            exit_code=ExitCode.BAD_DATA,
        )
    return rounded


def _encode_q8_0(values_MW: Tensor, out_MB: Tensor) -> None:
    largest_M1 = values_MW.abs().amax(dim=1, keepdim=True)
    scale_M1 = largest_M1 / 127
    _rounded("f16", scale_M1)
    inverse_M1 = torch.where(scale_M1 == 0, 0, 1 / scale_M1)
    # ggml rounds halves away from zero.
    scaled = values_MW * inverse_M1
    rounded = scaled.abs().add_(0.5).floor_().copysign_(scaled)
    out_MB[:, :2] = scale_M1.half().view(torch.uint8)
    out_MB[:, 2:] = rounded.to(torch.int8).view(torch.uint8)


def _aligned(data: Tensor) -> Tensor:
    """A view as a wider dtype needs an even address."""
    return data.clone() if data.storage_offset() % 4 else data


def _damaged(name: str, found: str) -> UserError:
    return UserError(f"{name} data: damaged", found=found, fix="export it again", exit_code=ExitCode.BAD_DATA)


_DENSE_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_TQ1_0_PARTS = (
    # bytes, weights, weights to a byte
    (slice(0, 32), slice(0, 160), 5),
    (slice(32, 48), slice(160, 240), 5),
    (slice(48, 52), slice(240, 256), 4),
)
_TQ1_0_BIAS = torch.tensor([121] * 48 + [120] * 4, dtype=torch.int8)
"""Σ 3ⁿ over the digits of a byte, which turns codes into digits."""
_TERNARY_ENCODERS: dict[str, tuple[slice, Callable[[Tensor, Tensor], None]]] = {
    "tq2_0": (slice(0, 64), _encode_tq2_0),
    "tq1_0": (slice(0, 52), _encode_tq1_0),
    "q2_0": (slice(2, 18), _encode_q2_0),
    "i2_s": (slice(0, 32), _encode_i2_s),
}
_TERNARY_DECODERS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "tq2_0": _decode_tq2_0,
    "tq1_0": _decode_tq1_0,
    "q2_0": _decode_q2_0,
    "i2_s": _decode_i2_s,
}
