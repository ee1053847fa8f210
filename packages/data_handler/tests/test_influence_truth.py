"""Influence against what really happens to a probe when a tiny model trains."""

import statistics

import pytest
import torch

from data_handler.influence.config import InfluenceConfig, InfluenceMethod
from data_handler.influence.datainf import create_influence_calculator
from data_handler.influence.truth import (
    TinyDecoder,
    draw,
    harm,
    join,
    markov_chain,
    next_token_loss,
    planted_chains,
    planted_run,
    spearman,
    step_truth,
    train,
)

pytestmark = pytest.mark.slow
EXAMPLES = 40
RATE = 1e-3


def one_step_agreement(seed: int) -> dict[str, float]:
    """Spearman of both methods with the true change, share of right signs, size of the second-order term."""
    torch.manual_seed(seed)
    model = TinyDecoder().double()
    generator = torch.Generator().manual_seed(seed)
    chains = [markov_chain(100 * seed + place, sharpness=3.0) for place in range(4)]
    train(model, lambda step: join([draw(chain, 8, generator) for chain in chains]), steps=40)
    probe = draw(chains[0], 64, generator)
    examples = join([draw(chain, EXAMPLES // 4, generator) for chain in chains])
    true = step_truth(model, next_token_loss, examples, probe, count=EXAMPLES, rate=RATE)
    half = step_truth(model, next_token_loss, examples, probe, count=EXAMPLES, rate=RATE / 2)
    found = {"second_order": float(2 * (true - half).norm() / half.norm())}
    for method in InfluenceMethod:
        config = InfluenceConfig(method=method, projection_dim=None, damping=1.0, batch_size=64)
        calculator = create_influence_calculator(model, next_token_loss, config)
        calculator.cache_probe_gradients({"probe": [probe]})
        scores = calculator.compute_influence(examples)
        found[method] = spearman(scores, true)
        found[f"{method} signs"] = float((scores.sign() == true.sign()).double().mean())
    return found


def test_scores_rank_examples_as_one_step_on_each_does() -> None:
    found = [one_step_agreement(seed) for seed in range(5)]

    assert max(each["second_order"] for each in found) < 0.05
    assert statistics.median(each["gradient_dot"] for each in found) >= 0.9
    assert statistics.median(each["gradient_dot signs"] for each in found) >= 0.9
    assert statistics.median(each["datainf"] for each in found) >= 0.6


def test_planted_sources_are_worth_what_their_names_say() -> None:
    found = [harm(planted_chains(seed), planted_chains(seed)["useful"], seed=seed) for seed in range(3)]

    for harms in found:
        assert harms["useful"] < 0.02
        assert abs(harms["neutral"]) < 0.02
        assert min(harms["garbage"], harms["contrary"]) > 0.1


def test_weights_follow_what_planted_sources_are_worth() -> None:
    for seed in range(3):
        chains = planted_chains(seed)

        weights = planted_run(chains, chains["useful"], seed=seed, follow_influence=True).weights

        assert weights["useful"] > 0.30
        assert weights["useful"] > weights["neutral"] > weights["garbage"]
        assert weights["neutral"] > weights["contrary"]
        assert max(weights["garbage"], weights["contrary"]) < 0.25


def test_where_no_source_is_better_weights_stay_near_uniform() -> None:
    chains = dict.fromkeys(["one", "two", "three", "four"], markov_chain(1))

    for seed in range(3):
        run = planted_run(chains, markov_chain(1), seed=seed, follow_influence=True)

        assert run.num_updates == 6
        assert all(0.20 < weight < 0.30 for weight in run.weights.values())
