"""Turn a dense `llama` file into one with experts that are all the same: what an engine does with a mixture
of experts, without a model that was trained as one.

    blk.N.ffn_gate.weight  [F, D]    →   blk.N.ffn_gate_exps.weight  [experts, F, D], and so for up and down
                                         blk.N.ffn_gate_inp.weight   [experts, D], the router

The engine takes the softmax of the router's products, keeps the k largest and divides them by their sum, so
k equal experts add up to the dense model whichever they are (`even_router` makes them about equally likely).

Shapes: D hidden, F the MLP's width.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from bitnet_serving.encoding import encode_dense
from bitnet_serving.even_router import mlp_inputs, router_rows
from bitnet_serving.formats import DENSE_FORMATS, GGUF_FORMATS
from bitnet_serving.gguf_reader import GGUFFile, GGUFTensor, read_gguf
from bitnet_serving.gguf_writer import TensorToWrite, write_gguf
from durable import ExitCode, UserError

EXPERT_ROLES = ("ffn_gate", "ffn_up", "ffn_down")
MOST_EXPERTS = 512
"""That llama.cpp takes."""


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


@dataclass(frozen=True, slots=True)
class _Mixture:
    dense: GGUFFile
    num_experts: int
    routers: list[Tensor]
    """Of each layer, [experts, D]."""

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
                yield self._router(int(layer))

    def _copied(self, tensor: GGUFTensor, name: str, shape: tuple[int, ...], *, copies: int) -> TensorToWrite:
        return TensorToWrite(
            name=name,
            format=tensor.block_format.name,
            shape=shape,
            produce=lambda: self.dense.data(tensor.name).repeat(copies),
        )

    def _router(self, layer: int) -> TensorToWrite:
        rows = self.routers[layer]
        return TensorToWrite(
            name=f"blk.{layer}.ffn_gate_inp.weight",
            format="f32",
            shape=tuple(rows.shape),
            produce=lambda: encode_dense("f32", rows),
        )


def _convert(
    source: Path, output: Path, num_experts: int, top_k: int, quant_type: str | None, model_name: str | None
) -> Path:
    dense = read_gguf(source)
    _check_dense(dense, quant_type)
    metadata = dict(dense.metadata)
    if model_name is not None:
        metadata["general.name"] = model_name
    metadata |= {"llama.expert_count": num_experts, "llama.expert_used_count": top_k}
    routers = [router_rows(x, num_experts, seed=layer) for layer, x in enumerate(mlp_inputs(dense))]
    write_gguf(output, metadata, list(_Mixture(dense, num_experts, routers).tensors()), replace=True)
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
    for name, shape in _expected(dense):
        if name not in names:
            raise _unsuitable(dense, f"no {name}", "a whole model")
        if dense.tensors[name].shape != shape:
            raise _unsuitable(
                dense, f"{name} of shape {dense.tensors[name].shape}", f"{shape} as in its keys"
            )
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


def _expected(dense: GGUFFile) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what a router is made from, and of what becomes experts."""
    hidden, ffn, layers, heads = (
        _number(dense, key)
        for key in ("embedding_length", "feed_forward_length", "block_count", "attention.head_count")
    )
    kv_heads = _number(dense, "attention.head_count_kv")
    head_dim = _number(dense, "attention.value_length", default=hidden // heads)
    if heads % kv_heads:
        raise _unsuitable(dense, f"{heads} heads in {kv_heads} groups", "a whole model")
    yield "token_embd.weight", (_rows(dense), hidden)
    for layer in range(layers):
        yield f"blk.{layer}.attn_norm.weight", (hidden,)
        yield f"blk.{layer}.attn_v.weight", (kv_heads * head_dim, hidden)
        yield f"blk.{layer}.attn_output.weight", (hidden, heads * head_dim)
        yield f"blk.{layer}.ffn_norm.weight", (hidden,)
        yield f"blk.{layer}.ffn_gate.weight", (ffn, hidden)
        yield f"blk.{layer}.ffn_up.weight", (ffn, hidden)
        yield f"blk.{layer}.ffn_down.weight", (hidden, ffn)


def _number(dense: GGUFFile, key: str, *, default: int | None = None) -> int:
    value = dense.metadata.get(f"llama.{key}", default)
    if not isinstance(value, int) or value < 1:
        raise _unsuitable(dense, f"llama.{key} = {value}", "a whole model")
    return value


def _rows(dense: GGUFFile) -> int:
    embedding = dense.tensors.get("token_embd.weight")
    return embedding.shape[0] if embedding is not None else 0


def _unsuitable(dense: GGUFFile, found: str, fix: str) -> UserError:
    return UserError(
        f"{dense.path}: cannot be given experts", found=found, fix=fix, exit_code=ExitCode.BAD_INPUT
    )
