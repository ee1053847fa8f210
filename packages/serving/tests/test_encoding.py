"""Encoded bytes against `gguf`'s numpy codecs, and against the layouts written out in plain loops."""

import math
import struct
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from bitnet_serving import encoding
from bitnet_serving.encoding import decode_dense, decode_ternary, encode_dense, encode_ternary, stored_scale
from bitnet_serving.formats import TERNARY_FORMATS
from durable import ExitCode, UserError

SCALE = 0.0375  # neither fp16 nor fp32 has it
ROWS, COLUMNS = 6, 768


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one shorter, in tensors of a few thousand weights."""
    monkeypatch.setattr(encoding, "CHUNK_WEIGHTS", 5 * 256 + 3)


def random_codes(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-1, 2, (rows, columns), dtype=torch.int8, generator=generator)


def bytes_of_upstream(values: Tensor, name: str) -> bytes:
    return quants.quantize(values.numpy(), GGMLQuantizationType[name.upper()]).tobytes()


# What bytes mean, from the engines' layouts: one weight at a time.


def half(data: bytes) -> float:
    return float(struct.unpack("<e", data)[0])


def weights_of_tq2_0(data: bytes) -> list[float]:
    weights = []
    for start in range(0, len(data), 66):
        scale = half(data[start + 64 : start + 66])
        for h, n, m in product(range(2), range(4), range(32)):
            weights.append((((data[start + 32 * h + m] >> (2 * n)) & 3) - 1) * scale)
    return weights


def weights_of_tq1_0(data: bytes) -> list[float]:
    def trit(byte: int, n: int) -> int:
        return ((byte * int(3**n) % 256) * 3 >> 8) - 1

    weights = []
    for start in range(0, len(data), 54):
        block, scale = data[start : start + 52], half(data[start + 52 : start + 54])
        trits = [trit(block[m], n) for n, m in product(range(5), range(32))]
        trits += [trit(block[32 + m], n) for n, m in product(range(5), range(16))]
        trits += [trit(block[48 + j], n) for n, j in product(range(4), range(4))]
        weights += [each * scale for each in trits]
    return weights


def weights_of_q2_0(data: bytes) -> list[float]:
    weights = []
    for start in range(0, len(data), 18):
        scale, codes = half(data[start : start + 2]), data[start + 2 : start + 18]
        weights += [(((codes[j // 4] >> (2 * (j % 4))) & 3) - 1) * scale for j in range(64)]
    return weights


def weights_of_i2_s(data: bytes) -> list[float]:
    num_code_bytes = len(data) - 32
    (scale,) = struct.unpack_from("<f", data, num_code_bytes)
    weights = [0.0] * (4 * num_code_bytes)
    for group, g, n in product(range(num_code_bytes // 32), range(32), range(4)):
        code = (data[32 * group + g] >> (6 - 2 * n)) & 3
        weights[128 * group + 32 * n + g] = (code - 1) * scale
    assert data[num_code_bytes + 4 :] == bytes(28)
    return weights


LAYOUTS: dict[str, Callable[[bytes], list[float]]] = {
    "tq2_0": weights_of_tq2_0,
    "tq1_0": weights_of_tq1_0,
    "q2_0": weights_of_q2_0,
    "i2_s": weights_of_i2_s,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_weight_stands_where_the_layout_says(name: str) -> None:
    codes = random_codes()

    data = bytes(encode_ternary(name, codes, SCALE).numpy())

    scale = struct.unpack(
        "<f" if name == "i2_s" else "<e", struct.pack("<f" if name == "i2_s" else "<e", SCALE)
    )
    assert LAYOUTS[name](data) == [code * scale[0] for code in codes.view(-1).tolist()]
    assert stored_scale(name, SCALE) == scale[0]


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        ("tq2_0", ROWS * COLUMNS // 256 * 66),
        ("tq1_0", ROWS * COLUMNS // 256 * 54),
        ("q2_0", ROWS * COLUMNS // 64 * 18),
        ("i2_s", ROWS * COLUMNS // 4 + 32),
    ],
)
def test_a_tensor_takes_the_bytes_of_its_blocks(name: str, num_bytes: int) -> None:
    assert encode_ternary(name, random_codes(), SCALE).shape == (num_bytes,)
    assert TERNARY_FORMATS[name].num_bytes(ROWS, COLUMNS) == num_bytes


@pytest.mark.parametrize("name", ["tq2_0", "tq1_0"])
def test_ternary_bytes_are_those_of_upstream(name: str) -> None:
    # A block with all three values: upstream takes the scale from the largest magnitude.
    codes = random_codes()

    data = encode_ternary(name, codes, SCALE)

    assert bytes(data.numpy()) == bytes_of_upstream(codes.float() * SCALE, name)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("codes", [random_codes(), torch.zeros(1, 256).char(), -torch.ones(2, 256).char()])
def test_codes_and_scales_come_back(name: str, codes: Tensor) -> None:
    back, scales = decode_ternary(name, encode_ternary(name, codes, SCALE), *codes.shape)

    assert torch.equal(back, codes)
    num_scales = 1 if name == "i2_s" else codes.numel() // TERNARY_FORMATS[name].block_columns
    torch.testing.assert_close(scales, torch.full((num_scales,), SCALE), rtol=2**-11, atol=0)


def test_every_byte_of_five_and_of_four_codes_comes_back() -> None:
    every = torch.tensor(list(product((-1, 0, 1), repeat=5)), dtype=torch.int8)  # [243, 5]
    codes = torch.zeros(243, 256, dtype=torch.int8)
    codes[:, 3:160:32], codes[:, 163:240:16], codes[:, 243:256:4] = every, every, every[:, :4]

    back, _ = decode_ternary("tq1_0", encode_ternary("tq1_0", codes, 1.0), 243, 256)

    assert torch.equal(back, codes)


def test_columns_that_lie_apart_are_encoded_as_if_they_did_not() -> None:
    codes = random_codes(256, 6).t()

    assert torch.equal(encode_ternary("tq2_0", codes, 1.0), encode_ternary("tq2_0", codes.contiguous(), 1.0))


@pytest.mark.parametrize(("name", "byte"), [("tq2_0", 0), ("q2_0", 2), ("i2_s", 31)])
def test_a_fourth_code_is_refused(name: str, byte: int) -> None:
    data = encode_ternary(name, random_codes(), SCALE)
    data[byte] = 0b00_11_00_01

    with pytest.raises(UserError, match="two-bit code of 3") as caught:
        decode_ternary(name, data, ROWS, COLUMNS)
    assert caught.value.exit_code == ExitCode.BAD_DATA


def test_bytes_that_stand_for_no_codes_are_refused() -> None:
    sound = encode_ternary("tq1_0", random_codes(1, 256), SCALE)
    taken = {math.ceil(256 * number / 243) for number in range(243)}
    taken_by_four = {math.ceil(256 * number / 243) for number in range(0, 243, 3)}

    for place, allowed in ((47, taken), (48, taken_by_four)):
        for byte in range(256):
            data = sound.clone()
            data[place] = byte
            if byte in allowed:
                decode_ternary("tq1_0", data, 1, 256)
            else:
                with pytest.raises(UserError, match="stands for no codes"):
                    decode_ternary("tq1_0", data, 1, 256)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_scale_that_is_no_number_is_refused(name: str) -> None:
    data = encode_ternary(name, random_codes(), SCALE)
    place = {"q2_0": 0, "i2_s": data.numel() - 32}.get(name, data.numel() - 2)
    data[place : place + (4 if name == "i2_s" else 2)] = 0xFF

    with pytest.raises(UserError, match="no number"):
        decode_ternary(name, data, ROWS, COLUMNS)


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-9, 1e6, math.inf, math.nan])
def test_a_scale_that_fp16_cannot_keep_is_refused(scale: float) -> None:
    with pytest.raises(UserError, match="cannot keep this scale"):
        encode_ternary("tq2_0", random_codes(), scale)


@pytest.mark.parametrize("code", [-2, 2, 127])
def test_codes_that_are_not_ternary_are_refused(code: int) -> None:
    codes = random_codes()
    codes[-1, -1] = code

    with pytest.raises(UserError, match="a code other than"):
        encode_ternary("tq2_0", codes, SCALE)


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("spread", [1e-6, 1.0, 300.0])
def test_dense_bytes_are_those_of_upstream(name: str, spread: float) -> None:
    values = torch.randn(37, 96, generator=torch.Generator().manual_seed(1)) * spread
    values[3] = 0

    data = encode_dense(name, values)

    assert bytes(data.numpy()) == bytes_of_upstream(values, name)
    back = quants.dequantize(
        np.frombuffer(bytes_of_upstream(values, name), np.uint8).reshape(37, -1),
        GGMLQuantizationType[name.upper()],
    )
    assert torch.equal(decode_dense(name, data, 37, 96), torch.tensor(back).view(37, 96))


def test_halves_are_rounded_away_from_zero() -> None:
    values = torch.zeros(1, 32)
    # With 127 as the largest magnitude the scale is 1; the largest number below a half is no half.
    values[0, :8] = torch.tensor([127, 0.5, -0.5, 1.5, 2.5, -2.5, 0.5 - 2**-25, 2**-25 - 0.5])

    assert decode_dense("q8_0", encode_dense("q8_0", values), 1, 32)[0, :8].tolist() == [
        *(127, 1, -1, 2, 3, -3),
        *(0, 0),
    ]


def test_a_block_of_almost_nothing_becomes_zeros() -> None:
    values = torch.full((1, 32), 1e-40)

    assert decode_dense("q8_0", encode_dense("q8_0", values), 1, 32).count_nonzero() == 0


@pytest.mark.parametrize("name", ["f16", "q8_0"])
@pytest.mark.parametrize("value", [1e8, math.nan, -math.inf])
def test_values_that_would_become_infinite_are_refused(name: str, value: float) -> None:
    values = torch.zeros(40, 32)
    values[17, 3] = value

    with pytest.raises(UserError, match="cannot hold these values"):
        encode_dense(name, values)


def test_a_tensor_on_its_own_dtype_is_rounded_once() -> None:
    values = torch.randn(3, 32).bfloat16()

    assert torch.equal(decode_dense("bf16", encode_dense("bf16", values), 3, 32), values.float())
    assert torch.equal(decode_dense("f16", encode_dense("f16", values), 3, 32), values.half().float())
