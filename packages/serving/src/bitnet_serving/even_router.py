"""A router for experts that are all the same: random, and without a favourite.

What all tokens have in common would choose the same experts for all of them, so rows are made at right angles
to the mean input of their MLP, and equally sensitive to what is left. The inputs are those of a few hundred
tokens of the vocabulary that pay equal attention to each other, which needs no positions:

    h = embedding;  in each layer   h += o · mean(v · norm(h));   x = norm(h);   h += MLP(x)

Shapes: S tokens, E experts, D hidden, F the MLP's width, H all heads together.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bitnet_serving.encoding import decode_dense, decode_ternary
from bitnet_serving.formats import TERNARY_FORMATS
from bitnet_serving.gguf_reader import GGUFFile

NUM_TOKENS = 256
SPREAD = 0.1
"""Standard deviation of a router's products: small, so that the experts in use weigh about the same."""


def router_rows(x_SD: Tensor, num_experts: int, *, seed: int) -> Tensor:
    """[E, D]: random rows for an MLP with such inputs."""
    generator = torch.Generator().manual_seed(seed)
    rows_ED = torch.randn(num_experts, x_SD.shape[1], generator=generator, dtype=torch.float64)
    mean_D = F.normalize(x_SD.double().mean(0), dim=0)
    rows_ED -= torch.outer(rows_ED @ mean_D, mean_D)
    deviation_E1 = (rows_ED @ x_SD.double().t()).std(dim=1, keepdim=True)
    return (SPREAD / deviation_E1.clamp(min=1e-6) * rows_ED).float()


def mlp_inputs(file: GGUFFile) -> Iterator[Tensor]:
    """[S, D] of each layer of a dense `llama` file."""
    h_SD = _embedded(file)
    for layer in range(_number(file, "block_count")):
        block = f"blk.{layer}"
        v_H = _linear(file, f"{block}.attn_v", _norm(file, f"{block}.attn_norm", h_SD)).mean(0)
        heads = v_H.unflatten(0, (_number(file, "attention.head_count_kv"), -1))
        copies = _number(file, "attention.head_count") // len(heads)
        h_SD = h_SD + _linear(file, f"{block}.attn_output", heads.repeat_interleave(copies, 0).flatten())
        x_SD = _norm(file, f"{block}.ffn_norm", h_SD)
        yield x_SD
        inner_SF = F.silu(_linear(file, f"{block}.ffn_gate", x_SD)) * _linear(file, f"{block}.ffn_up", x_SD)
        h_SD = h_SD + _linear(file, f"{block}.ffn_down", inner_SF)


def _embedded(file: GGUFFile) -> Tensor:
    """[S, D]: tokens from all over the vocabulary."""
    tensor = file.tensors["token_embd.weight"]
    num_rows, width = tensor.shape
    chosen_S = torch.linspace(0, num_rows - 1, min(NUM_TOKENS, num_rows)).round().long()
    data = file.data(tensor.name).view(num_rows, -1)[chosen_S].flatten()
    return decode_dense(tensor.block_format.name, data, len(chosen_S), width)


def _linear(file: GGUFFile, name: str, x: Tensor) -> Tensor:
    y = x @ _matrix(file, name).t()
    return y + _vector(file, f"{name}.bias") if f"{name}.bias" in file.tensors else y


def _norm(file: GGUFFile, name: str, h_SD: Tensor) -> Tensor:
    eps = file.metadata["llama.attention.layer_norm_rms_epsilon"]
    assert isinstance(eps, float)
    return F.rms_norm(h_SD, h_SD.shape[-1:], _vector(file, f"{name}.weight"), eps)


def _matrix(file: GGUFFile, name: str) -> Tensor:
    tensor = file.tensors[f"{name}.weight"]
    rows, columns = tensor.shape
    form, data = tensor.block_format.name, file.data(tensor.name)
    if form not in TERNARY_FORMATS:
        values = decode_dense(form, data, rows, columns)
    else:
        codes, scales = decode_ternary(form, data, rows, columns)
        values = (codes.float().view(len(scales), -1) * scales[:, None]).view(rows, columns)
    return values * _vector(file, f"{name}.scale") if f"{name}.scale" in file.tensors else values


def _vector(file: GGUFFile, name: str) -> Tensor:
    tensor = file.tensors[name]
    return decode_dense(tensor.block_format.name, file.data(name), 1, tensor.shape[-1])[0]


def _number(file: GGUFFile, key: str) -> int:
    value = file.metadata[f"llama.{key}"]
    assert isinstance(value, int)
    return value
