"""What a checkpoint's model expects next, computed by PyTorch: what an engine's answers are held against.

Twice, because engines round activations in their own way, if at all:

    int8     the model as it was trained: ternary weights, int8 activations per token. Embedding and head are
             those of the file, which may be rounded too (q8_0, whose engines round the head's input as well)
    float    the same ternary weights, activations as they come; embedding and head of the checkpoint

Both at λ = μ = 1, in fp32, without activation sparsity, which no engine has. The Kullback-Leibler divergence
between the two is the noise of all this rounding. It makes a network chaotic: a change of one part in 2000
draws all of that noise anew, so of two correct programs neither is nearer than that.

Shapes: P positions, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitnet_arch import load_bitnet, set_sparsity, set_subln_amount
from bitnet_arch.bitlinear import BitLinear, bitlinears
from bitnet_arch.lrc import BitLinearLRC
from bitnet_arch.quant import dequantize_activations, quantize_activations
from bitnet_arch.walk import walk


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Log-probabilities of the next token, float64."""

    int8: Tensor
    """[P, V]"""
    float: Tensor
    """[P, V]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """Embedding and head as a file has them, without padding."""

    embedding: Tensor
    head: Tensor
    rounds_input: bool
    """The engine multiplies the head with int8 activations."""


class FloatActivations(nn.Module):
    """A ternary layer that takes its input as it comes."""

    def __init__(self, layer: BitLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer.normalized(x)
        y = F.linear(x, self.layer.effective_weight(), self.layer.bias)
        return y + self.layer.correction(x) if isinstance(self.layer, BitLinearLRC) else y


def load_reference(checkpoint: Path, *, keep_sparsity: bool = False) -> PreTrainedModel:
    """The model at λ = μ = 1 in fp32, which changes no code and no scale."""
    model = load_bitnet(checkpoint)
    model.float()
    if not keep_sparsity:
        set_sparsity(model, None)
    set_subln_amount(model, 1.0)
    for layer in bitlinears(model):
        layer.quant_amount = layer.activation_amount = 1.0
    return model


def reference_log_probs(
    model: PreTrainedModel, sequences: Iterable[Sequence[int]], *, tables: Tables
) -> Reference:
    """At every position of every sequence, over the tokens that the file has."""
    sequences, num_tokens = list(sequences), len(tables.embedding)
    with float_activations(model):
        float_PV = log_probs(model, sequences, num_tokens=num_tokens)
    _use_tables(model, tables)
    return Reference(int8=log_probs(model, sequences, num_tokens=num_tokens), float=float_PV)


def float_activations(model: nn.Module) -> AbstractContextManager[object]:
    """Within, ternary layers do not quantise their inputs."""
    restore = ExitStack()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BitLinear)}
    for name, layer in layers.items():
        model.set_submodule(name, FloatActivations(layer))
        restore.callback(model.set_submodule, name, layer)
    return restore


def _use_tables(model: PreTrainedModel, tables: Tables) -> None:
    walked = walk(model)
    model.get_submodule(walked.embedding).weight = nn.Parameter(tables.embedding)
    head = model.get_submodule(walked.head)
    head.weight = nn.Parameter(tables.head)
    if tables.rounds_input:
        head.register_forward_pre_hook(_round_input)


def _round_input(_head: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return dequantize_activations(*quantize_activations(inputs[0]))


@torch.no_grad()
def log_probs(model: PreTrainedModel, sequences: Iterable[Sequence[int]], *, num_tokens: int) -> Tensor:
    """Of the next token, [P, V], as the model is set."""
    rows_1P = [torch.tensor([list(sequence)]) for sequence in sequences]
    logits = [model(input_ids=row_1P, use_cache=False).logits[0, :, :num_tokens] for row_1P in rows_1P]
    return torch.cat(logits).double().log_softmax(-1)
