"""Per-example gradients through real ternary layers: those of one backward pass for each example.

The straight-through gradient of a ternary layer's weight belongs to the tensor that really met the weight
(normed, thinned out, rounded), which the layer gives as its `effective_input`.
"""

import pytest
import torch
from torch import Tensor, nn

from bitnet_arch import (
    BitLinear,
    ConversionConfig,
    Sparsity,
    convert_to_bitnet,
    set_quant_amount,
    set_sparsity,
)
from bitnet_arch.testing import tiny_llama
from data_handler import Batch
from data_handler.influence.gradients import GradientExtractor, take
from data_handler.influence.language import language_loss
from data_handler.types import IGNORED_LABEL

# 5 examples of 7 tokens, two documents in each; chunks of 2 leave a last one of 1.
EXAMPLES, TOKENS, VOCABULARY = 5, 7, 37


def batch() -> Batch:
    ids = torch.randint(0, VOCABULARY, (EXAMPLES, TOKENS), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[0] * (2 + n) + [1] * (TOKENS - 2 - n) for n in range(EXAMPLES)])
    begins = torch.zeros_like(ids, dtype=torch.bool)
    begins[:, 0] = True
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    positions = torch.arange(TOKENS).expand_as(ids) - documents * (2 + torch.arange(EXAMPLES))[:, None]
    return Batch(
        input_ids=ids,
        labels=ids.masked_fill(begins, IGNORED_LABEL),
        position_ids=positions,
        document_ids=documents,
        source_id=torch.zeros(EXAMPLES, dtype=torch.int64),
        sample_id=torch.arange(EXAMPLES),
    )


def ternary_model(*, quant_amount: float, tied: bool, dtype: torch.dtype) -> nn.Module:
    model = tiny_llama(vocab_size=VOCABULARY, num_hidden_layers=1, tie_word_embeddings=tied)
    convert_to_bitnet(model, ConversionConfig(subln="output"))
    set_quant_amount(model, quant_amount)
    set_sparsity(model, Sparsity(ratio=0.25))
    return model.double() if dtype == torch.float64 else model


def one_by_one(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Name of a layer → [B, R, C], by a backward pass for each example."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for index in range(EXAMPLES):
        model.zero_grad()
        language_loss(model, take(batch(), slice(index, index + 1))).sum().backward()
        for name in names:
            grad = model.get_submodule(name).weight.grad
            assert isinstance(grad, Tensor)
            found[name].append(grad.clone())
    model.zero_grad()
    return {name: torch.stack(grads) for name, grads in found.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quant_amount", [1.0, 0.5, 0.0])
def test_gradients_are_those_of_one_backward_pass_each(quant_amount: float, tied: bool) -> None:
    # float64, or a batch of two and a batch of one would round some activations to other integers.
    model = ternary_model(quant_amount=quant_amount, tied=tied, dtype=torch.float64).eval()
    extractor = GradientExtractor(model, language_loss, projection_dim=None, chunk=2)

    found = extractor(batch())

    num_ternary = sum(isinstance(layer, BitLinear) for layer in model.modules())
    assert num_ternary == 7
    assert len(extractor.blocks) == num_ternary + (1 if tied else 2)
    for name, expected in one_by_one(model, list(extractor.blocks)).items():
        ours = found[:, extractor.blocks[name]].reshape(expected.shape)
        # Logits and blended inputs pass through float32.
        error = (ours - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        assert float(error.max()) < 1e-5, name


def test_in_float32_one_example_at_a_time_is_the_same() -> None:
    model = ternary_model(quant_amount=1.0, tied=True, dtype=torch.float32).eval()
    extractor = GradientExtractor(model, language_loss, projection_dim=None, chunk=1)

    found = extractor(batch())

    for name, expected in one_by_one(model, list(extractor.blocks)).items():
        ours = found[:, extractor.blocks[name]].reshape(expected.shape)
        error = (ours - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        assert float(error.max()) < 1e-5, name
