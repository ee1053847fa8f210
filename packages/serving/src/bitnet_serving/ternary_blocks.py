"""The codes of ternary blocks as bytes, and back, without their scales.

    tq2_0   64 bytes for 256 weights: in each half, byte m holds the weights m, 32+m, 64+m, 96+m, the first in
            its lowest two bits
    tq1_0   52 bytes for 256 weights: 32 bytes of five weights (m, 32+m, … 128+m), 16 bytes of five (160+m,
            176+m, …), 4 bytes of four (240+m, 244+m, …). A byte is the first 256th at or above the base-3
            fraction whose digits the weights are, the first weight first
    q2_0    16 bytes for 64 weights: four neighbours, the first in the lowest two bits
    i2_s    32 bytes for 128 weights: byte m holds m, 32+m, 64+m, 96+m, the first in its highest two bits

Two bits and base-3 digits hold the code + 1: 0, 1 or 2. A decoder refuses bytes that no encoder writes.

Shapes: M blocks of W weights, codes int8 [M, W]; M blocks of B bytes, bytes [M, B].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from durable import ExitCode, UserError


@dataclass(frozen=True, slots=True)
class TernaryBlock:
    """Where the codes are in a block, and how they get there and back."""

    place: slice
    scale_place: slice | None
    """Of the block's fp16 scale, if it has one."""
    encode: Callable[[Tensor, Tensor], None]
    """(codes int8 [M, W], where to: bytes as int8 [M, B])"""
    decode: Callable[[Tensor, Tensor], None]
    """(bytes uint8 [M, B], where to: codes int8 [M, W])"""


def _encode_tq2_0(codes_MW: Tensor, out_MB: Tensor) -> None:
    x = codes_MW.view(-1, 2, 128)
    pairs = torch.add(x[..., :64], x[..., 64:], alpha=16)
    fours = torch.add(pairs[..., :32], pairs[..., 32:], alpha=4)
    # Modulo 256, Σ 4ⁿ·(code + 1) = Σ 4ⁿ·code + 85.
    torch.add(fours.view(-1, 64), 85, out=out_MB)


def _encode_i2_s(codes_MW: Tensor, out_MB: Tensor) -> None:
    pairs = torch.add(codes_MW[:, 64:], codes_MW[:, :64], alpha=16)
    fours = torch.add(pairs[:, 32:], pairs[:, :32], alpha=4)
    torch.add(fours, 85, out=out_MB)


def _encode_q2_0(codes_MW: Tensor, out_MB: Tensor) -> None:
    # Four codes are the bytes of a little-endian word; the product moves them side by side into its highest
    # byte, and no sum below it carries.
    word = (codes_MW + 1).view(torch.int32).mul_(1 << 24 | 1 << 18 | 1 << 12 | 1 << 6)
    out_MB.copy_(word.view(torch.int8)[:, 3::4])


def _encode_tq1_0(codes_MW: Tensor, out_MB: Tensor) -> None:
    for place, weights_in, digits in _TQ1_0_PARTS:
        first, *rest = codes_MW[:, weights_in].unflatten(1, (digits, -1)).unbind(1)
        total = torch.add(rest[0], first, alpha=3)
        for digit in rest[1:]:
            torch.add(digit, total, alpha=3, out=total)
        out_MB[:, place] = total.mul_(3 ** (5 - digits))
    numbers_MB = out_MB.add(_TQ1_0_BIAS).view(torch.uint8).int()
    out_MB.copy_(_tq1_0_bytes(numbers_MB).to(torch.int8))


def _tq1_0_bytes(numbers: Tensor) -> Tensor:
    """⌈256·q / 243⌉ for q < 243, with a division by 2²² in place of the one by 243."""
    return (numbers * (256 * 17261)).add_(242 * 17261).bitwise_right_shift_(22)


def _decode_tq2_0(bytes_MB: Tensor, out_MW: Tensor) -> None:
    _decode_two_bits(bytes_MB.unflatten(1, (2, 32)), out_MW.view(-1, 2, 4, 32), shifts=(0, 2, 4, 6))


def _decode_i2_s(bytes_MB: Tensor, out_MW: Tensor) -> None:
    _decode_two_bits(bytes_MB, out_MW.view(-1, 4, 32), shifts=(6, 4, 2, 0))


def _decode_two_bits(data: Tensor, out: Tensor, *, shifts: tuple[int, ...]) -> None:
    """`out` has one more dimension before its last: the four weights of a byte."""
    _require_three_codes(data)
    for n, shift in enumerate(shifts):
        torch.sub((data >> shift).bitwise_and_(3), 1, out=out.select(-2, n).view(torch.uint8))


def _decode_q2_0(bytes_MB: Tensor, out_MW: Tensor) -> None:
    _require_three_codes(bytes_MB)
    # Two bits of a byte at a time move to where they belong in a word of four bytes.
    word = bytes_MB.int().mul_(1 << 12 | 1).bitwise_and_(0x000F000F).mul_(1 << 6 | 1).bitwise_and_(0x03030303)
    torch.sub(word.view(torch.int8), 1, out=out_MW)


def _decode_tq1_0(bytes_MB: Tensor, out_MW: Tensor) -> None:
    fractions_MB = bytes_MB.int()
    numbers_MB = (fractions_MB * 243).bitwise_right_shift_(8)
    if not torch.equal(_tq1_0_bytes(numbers_MB), fractions_MB) or (numbers_MB[:, 48:] % 3).amax() > 0:
        raise damaged_block("a byte that stands for no codes")
    for place, weights_in, digits in _TQ1_0_PARTS:
        out = out_MW[:, weights_in].unflatten(1, (digits, -1))
        for n in range(digits):
            # Modulo 256, what is left of the fraction behind its first n digits.
            rest = (bytes_MB[:, place] * 3**n).short()
            out[:, n] = rest.mul_(3).bitwise_right_shift_(8).sub_(1)


def _require_three_codes(data: Tensor) -> None:
    if (data & (data >> 1)).bitwise_and_(0b01010101).amax() > 0:
        raise damaged_block("a two-bit code of 3")


def damaged_block(found: str) -> UserError:
    """For bytes that no encoder writes."""
    return UserError(
        "ternary blocks: damaged", found=found, fix="export the file again", exit_code=ExitCode.BAD_DATA
    )


_TQ1_0_PARTS = (
    # bytes, weights, weights to a byte
    (slice(0, 32), slice(0, 160), 5),
    (slice(32, 48), slice(160, 240), 5),
    (slice(48, 52), slice(240, 256), 4),
)
_TQ1_0_BIAS = torch.tensor([121] * 48 + [120] * 4, dtype=torch.int8)
"""Σ 3ⁿ over the digits of a byte, which turns codes into digits."""
TERNARY_BLOCKS = {
    "tq2_0": TernaryBlock(slice(0, 64), slice(64, 66), _encode_tq2_0, _decode_tq2_0),
    "tq1_0": TernaryBlock(slice(0, 52), slice(52, 54), _encode_tq1_0, _decode_tq1_0),
    "q2_0": TernaryBlock(slice(2, 18), slice(0, 2), _encode_q2_0, _decode_q2_0),
    "i2_s": TernaryBlock(slice(0, 32), None, _encode_i2_s, _decode_i2_s),
}
