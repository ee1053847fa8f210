"""DataInf against the swapped inverse written out, and against limits that the paper implies."""

import pytest
import torch
from torch import Tensor

from data_handler.influence.config import InfluenceConfig
from data_handler.influence.datainf import create_influence_calculator
from data_handler.influence.truth import TinyDecoder, Tokens
from data_handler.influence.truth import next_token_loss as loss


def decoder() -> TinyDecoder:
    torch.manual_seed(3)
    return TinyDecoder(vocabulary=11, width=6, inner=13).double()


def tokens(num: int = 5) -> Tokens:
    return Tokens(torch.randint(0, 11, (num, 7), generator=torch.Generator().manual_seed(1)))


def explicit_scores(reference_nD: Tensor, probe_D: Tensor, scored_mD: Tensor, blocks: list[slice]) -> Tensor:
    """1/n Σ (g gᵀ + λI)⁻¹ as a matrix, layer by layer, with λ the mean squared norm."""
    total = torch.zeros(scored_mD.shape[0], dtype=torch.float64)
    for block in blocks:
        g, v, k = reference_nD[:, block], probe_D[block], scored_mD[:, block]
        damping = torch.stack([row @ row for row in g]).mean()
        eye = torch.eye(v.numel(), dtype=torch.float64)
        inverse = torch.stack([torch.linalg.inv(torch.outer(row, row) + damping * eye) for row in g]).mean(
            dim=0
        )
        total += k @ inverse @ v
    return total


def test_scores_equal_the_swapped_inverse_written_out() -> None:
    calculator = create_influence_calculator(decoder(), loss, InfluenceConfig(projection_dim=12))
    probe, train, scored = tokens(9), Tokens(tokens(9).input_ids.flip(1)), Tokens(tokens(6).input_ids.flip(0))
    calculator.cache_probe_gradients({"code": [probe]})
    reference = calculator.gradients([train])

    found = calculator.compute_influence(scored, reference=reference)

    extract = calculator.extractor
    blocks = list(extract.blocks.values())
    expected = explicit_scores(reference, extract(probe).mean(dim=0), extract(scored), blocks)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_large_damping_gives_the_gradient_product() -> None:
    model, batch = decoder(), tokens()
    ratio = 1e9
    calculator = create_influence_calculator(model, loss, InfluenceConfig(damping=ratio))
    dot = create_influence_calculator(model, loss, InfluenceConfig(method="gradient_dot"))  # type: ignore[arg-type]
    for each in (calculator, dot):
        each.extractor.blocks = {"all": slice(0, each.extractor.dim)}  # one λ for all
        each.cache_probe_gradients({"code": [tokens(3)]})
    gradients = calculator.gradients([batch])

    scaled = calculator.compute_influence(batch) * ratio * gradients.pow(2).sum(dim=1).mean()

    torch.testing.assert_close(scaled, dot.compute_influence(batch), rtol=1e-6, atol=1e-9)


def test_duplicates_score_the_same_and_the_probe_itself_helps() -> None:
    calculator = create_influence_calculator(decoder(), loss)
    twice = Tokens(tokens(4).input_ids[[0, 1, 0, 3, 1]])
    calculator.cache_probe_gradients({"code": [Tokens(twice.input_ids[:1])]})

    scores = calculator.compute_influence(twice)

    torch.testing.assert_close(scores[[0, 1]], scores[[2, 4]], rtol=1e-12, atol=0)
    assert scores[0] > 0


def test_every_domain_keeps_its_own_cache_and_weights_mix_them() -> None:
    calculator = create_influence_calculator(decoder(), loss)
    code, math = Tokens(tokens(6).input_ids[:3]), Tokens(tokens(6).input_ids[3:])
    batch = tokens()
    alone = []
    for probe in (code, math):
        calculator.cache_probe_gradients({"only": [probe]})
        alone.append(calculator.compute_influence(batch))
    calculator.cache_probe_gradients({"code": [code], "math": [math]})

    mixed = calculator.compute_influence(batch, domain_weights={"code": 3.0, "math": 1.0})

    assert not torch.allclose(alone[0], alone[1])
    torch.testing.assert_close(mixed, 0.75 * alone[0] + 0.25 * alone[1])
    with pytest.raises(ValueError, match="Domain weights name"):
        calculator.compute_influence(batch, domain_weights={"code": 1.0})


def test_a_layer_without_gradient_says_nothing() -> None:
    model = decoder()
    torch.nn.init.zeros_(model.get_parameter("down.weight"))  # so `up` receives no gradient
    calculator = create_influence_calculator(model, loss)
    calculator.cache_probe_gradients({"code": [tokens(3)]})

    scores = calculator.compute_influence(tokens())

    assert torch.isfinite(scores).all()


def test_probes_come_before_influence_and_an_empty_one_is_refused() -> None:
    calculator = create_influence_calculator(decoder(), loss)

    with pytest.raises(RuntimeError, match="cache_probe_gradients"):
        calculator.compute_influence(tokens())
    with pytest.raises(ValueError, match="probe math has no examples"):
        calculator.cache_probe_gradients({"math": []})
    assert not calculator.is_cached
