"""Turn a dense `llama` file into one with experts that are all the same: what an engine does with a mixture
of experts, without a model that was trained as one.

    blk.N.ffn_gate.weight  [F, D]    →   blk.N.ffn_gate_exps.weight  [experts, F, D], and so for up and down
                                         blk.N.ffn_gate_inp.weight   [experts, D], the router

The engine takes the softmax of the router's products, keeps the k largest and divides them by their sum, so
k equal experts add up to the dense model whichever they are. The router's rows are random directions at right
angles to the embedding's mean, so that what all tokens have in common favours no expert.

Shapes: D hidden, F the MLP's width, V vocabulary.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from bitnet_serving.encoding import decode_dense, encode_dense
from bitnet_serving.formats import DENSE_FORMATS, GGUF_FORMATS
from bitnet_serving.gguf_reader import GGUFFile, GGUFTensor, read_gguf
from bitnet_serving.gguf_writer import TensorToWrite, write_gguf
from durable import ExitCode, UserError

EXPERT_ROLES = ("ffn_gate", "ffn_up", "ffn_down")
MOST_EXPERTS = 512
"""That llama.cpp takes."""
MEAN_OF_ROWS = 4096
"""Rows of the embedding that stand for all of it."""


def convert_dense_to_fake_moe_gguf(
    model_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    num_experts: int = 8,
    top_k: int = 2,
    quant_type: str | None = None,
    model_name: str | None = None,
) -> Path:
    """Write a GGUF file, or a checkpoint (as `quant_type`), with `num_experts` copies of every MLP."""
    _check_counts(num_experts, top_k)
    source = Path(model_path)
    if not source.is_dir():
        return _convert(source, Path(output_path), num_experts, top_k, quant_type, model_name)
    from bitnet_serving.export import export_gguf

    output = Path(output_path)
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as directory:
        dense = Path(directory) / "dense.gguf"
        export_gguf(source, dense, body=quant_type)
        return _convert(dense, output, num_experts, top_k, None, model_name)


def router_rows(mean_D: Tensor, num_experts: int, *, seed: int) -> Tensor:
    """[experts, D]: short random rows at right angles to `mean_D`."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_experts, mean_D.numel(), generator=generator, dtype=torch.float64)
    direction = torch.nn.functional.normalize(mean_D.double(), dim=0)
    rows -= torch.outer(rows @ direction, direction)
    # Of length 1/10 for every row: no expert is favoured by its length, and weights are about equal.
    return (0.1 * torch.nn.functional.normalize(rows, dim=1)).float()


@dataclass(frozen=True, slots=True)
class _Mixture:
    dense: GGUFFile
    num_experts: int

    def tensors(self) -> Iterator[TensorToWrite]:
        for tensor in self.dense.tensors.values():
            layer, role, leaf = _parts(tensor.name)
            if role not in EXPERT_ROLES:
                yield self._copied(tensor, tensor.name, tensor.shape, copies=1)
                continue
            shape = (self.num_experts, *(tensor.shape if leaf == "weight" else ()))
            name = f"blk.{layer}.{role}_exps.{leaf}"
            yield self._copied(tensor, name, shape, copies=self.num_experts)
            if role == "ffn_gate" and leaf == "weight":
                yield self._router(int(layer), tensor.shape[-1])

    def _copied(self, tensor: GGUFTensor, name: str, shape: tuple[int, ...], *, copies: int) -> TensorToWrite:
        return TensorToWrite(
            name=name,
            format=tensor.block_format.name,
            shape=shape,
            produce=lambda: self.dense.data(tensor.name).repeat(copies),
        )

    def _router(self, layer: int, hidden: int) -> TensorToWrite:
        return TensorToWrite(
            name=f"blk.{layer}.ffn_gate_inp.weight",
            format="f32",
            shape=(self.num_experts, hidden),
            produce=self._router_data(layer),
        )

    def _router_data(self, layer: int) -> Callable[[], Tensor]:
        return lambda: encode_dense("f32", router_rows(self._mean(layer), self.num_experts, seed=layer))

    def _mean(self, layer: int) -> Tensor:
        """What the router sees on average, as far as the embedding tells: normed, times the norm's gain."""
        embedding = self.dense.tensors["token_embd.weight"]
        rows, hidden = min(embedding.shape[0], MEAN_OF_ROWS), embedding.shape[1]
        num_bytes = embedding.num_bytes // embedding.shape[0] * rows
        data = self.dense.data(embedding.name)[:num_bytes]
        values_VD = decode_dense(embedding.block_format.name, data, rows, hidden)
        gain_D = decode_dense("f32", self.dense.data(f"blk.{layer}.ffn_norm.weight"), 1, hidden)[0]
        return torch.nn.functional.rms_norm(values_VD, (hidden,)).mean(0) * gain_D


def _convert(
    source: Path, output: Path, num_experts: int, top_k: int, quant_type: str | None, model_name: str | None
) -> Path:
    dense = read_gguf(source)
    _check_dense(dense, quant_type)
    metadata = dict(dense.metadata)
    if model_name is not None:
        metadata["general.name"] = model_name
    metadata |= {"llama.expert_count": num_experts, "llama.expert_used_count": top_k}
    write_gguf(output, metadata, list(_Mixture(dense, num_experts).tensors()), replace=True)
    return output


def _parts(name: str) -> tuple[str, str, str]:
    """Layer, role and leaf of `blk.3.ffn_up.weight`; empty ones outside layers."""
    parts = name.split(".")
    return (parts[1], parts[2], parts[3]) if len(parts) == 4 and parts[0] == "blk" else ("", "", "")


def _check_counts(num_experts: int, top_k: int) -> None:
    if not 1 <= num_experts <= MOST_EXPERTS:
        raise UserError("num_experts: an engine cannot hold as many", num_experts, f"1 to {MOST_EXPERTS}")
    if not 1 <= top_k <= num_experts:
        raise UserError("top_k: as many experts cannot be used at once", top_k, f"1 to {num_experts}")


def _check_dense(dense: GGUFFile, quant_type: str | None) -> None:
    architecture = dense.metadata.get("general.architecture")
    names = dense.tensors.keys()
    if architecture != "llama":
        raise _unsuitable(dense, f"architecture {architecture}", "a model without SubLN, exported as `llama`")
    if any("_exps." in name for name in names):
        raise _unsuitable(dense, "experts", "a dense file")
    biases = [name for name in names if _parts(name)[1] in EXPERT_ROLES and name.endswith(".bias")]
    if biases:
        raise _unsuitable(dense, biases[0], "a model whose MLP has no biases, which experts cannot have")
    missing = [
        name for name in ("token_embd.weight", "blk.0.ffn_gate.weight", "blk.0.ffn_norm.weight")
        if name not in names
    ]  # fmt: skip
    if missing:
        raise _unsuitable(dense, f"no {missing[0]}", "a whole model")
    for tensor in dense.tensors.values():
        if tensor.block_format.name not in GGUF_FORMATS:
            raise _unsuitable(dense, f"{tensor.name} as {tensor.block_format.name}", "a file of export gguf")
    if dense.tensors["token_embd.weight"].block_format.name not in DENSE_FORMATS:
        raise _unsuitable(dense, "a ternary embedding", "a file of export gguf")
    body = dense.tensors["blk.0.ffn_gate.weight"].block_format.name
    if body == "i2_s":
        raise _unsuitable(dense, "i2_s, whose scale stands behind one matrix", "another type")
    if quant_type is not None and quant_type != body:
        raise _unsuitable(dense, f"projections as {body}", f"export the checkpoint with --type {quant_type}")


def _unsuitable(dense: GGUFFile, found: str, fix: str) -> UserError:
    return UserError(
        f"{dense.path}: cannot be given experts", found=found, fix=fix, exit_code=ExitCode.BAD_INPUT
    )
