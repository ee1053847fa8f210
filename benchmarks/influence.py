"""Does influence tell the truth? Scores against retraining, and moving weights against a static mixture.

    uv run python benchmarks/influence.py                     all questions, a few minutes on one core
    uv run python benchmarks/influence.py --only steps --seeds 3

    steps     (a) one descent step on each example: does its score rank what happens to the probe's loss?
    sources   (b) train without each of six sources: do mean scores rank what is missed?
    planted   (c) useful, neutral, garbage and contrary sources: what does mixing each in cost the probe,
                  where do the weights go, and does the probe gain?
    control   (d) four times the same source: do the weights stay?
    cost      what a training step takes with influence on, between updates, over one without (CPU time):
                  `experiment=chaos`, where everything else is on, too

Models and sources are those of `data_handler.influence.truth`; numbers are over seeds, with a 95 % bootstrap
interval. The ternary and projected scores of (a) are reported only: a step function hides small steps.
"""

import argparse
import contextlib
import functools
import io
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
from torch import nn

from bitnet_arch import BitLinear
from data_handler.influence.config import InfluenceConfig, InfluenceMethod
from data_handler.influence.datainf import create_influence_calculator
from data_handler.influence.truth import (
    TinyDecoder,
    Tokens,
    draw,
    harm,
    join,
    markov_chain,
    mean_loss,
    next_token_loss,
    planted_chains,
    planted_run,
    spearman,
    step_truth,
    train,
)
from wrinklefree.config import load_config
from wrinklefree.lightning.trainer import lightning_trainer
from wrinklefree.run import run

RATE = 1e-3
TERNARY_RATE = 1e-1
"""Large enough for some codes to flip."""


def interval(values: Sequence[float], middle: Callable[[Sequence[float]], float]) -> str:
    """The middle of the values and a 95 % bootstrap interval over seeds."""
    generator = random.Random(0)
    draws = sorted(middle(generator.choices(values, k=len(values))) for _ in range(2000))
    return f"{middle(values):+.3f} [{draws[50]:+.3f}, {draws[1949]:+.3f}]"


def steps(seed: int, *, ternary: bool) -> dict[str, float]:
    """(a) Spearman of each kind of score with the true fall of the probe's loss."""
    torch.manual_seed(seed)
    make: Callable[[int, int], nn.Module] = BitLinear if ternary else lambda k, n: nn.Linear(k, n, bias=False)
    model = TinyDecoder(make_linear=make)
    model = model if ternary else model.double()
    generator = torch.Generator().manual_seed(seed)
    chains = [markov_chain(100 * seed + place) for place in range(4)]
    train(model, lambda step: join([draw(chain, 8, generator) for chain in chains]), steps=40)
    probe = draw(chains[0], 64, generator)
    examples = join([draw(chain, 10, generator) for chain in chains])
    rate = TERNARY_RATE if ternary else RATE
    true = step_truth(model, next_token_loss, examples, probe, count=40, rate=rate)
    found = {}
    for method in InfluenceMethod:
        for keep in (None, 64):
            config = InfluenceConfig(method=method, projection_dim=keep, batch_size=64)
            calculator = create_influence_calculator(model, next_token_loss, config)
            calculator.cache_probe_gradients({"probe": [probe]})
            name = f"{method.value}, {'whole' if keep is None else f'projected to {keep}'}"
            found[name] = spearman(calculator.compute_influence(examples), true.double())
    return found


def sources(seed: int, *, num_sources: int = 6, num_steps: int = 150) -> dict[str, float]:
    """(b) Spearman of mean scores half-way with the probe loss that leaving a source out costs."""
    target = torch.log(markov_chain(1000 + seed))
    likeness = [place / (num_sources - 1) for place in range(num_sources)]
    chains = [
        torch.softmax(share * target + (1 - share) * torch.log(markov_chain(2000 + 10 * seed + place)), dim=1)
        for place, share in enumerate(likeness)
    ]
    probe = draw(markov_chain(1000 + seed), 128, torch.Generator().manual_seed(seed))
    test = draw(markov_chain(1000 + seed), 1024, torch.Generator().manual_seed(500 + seed))

    def trained(kept: list[int], num: int) -> TinyDecoder:
        torch.manual_seed(seed)
        model, generator = TinyDecoder(), torch.Generator().manual_seed(seed)

        def batch(step: int) -> Tokens:
            return join([draw(chains[place], 30 // len(kept), generator) for place in kept])

        train(model, batch, steps=num)
        return model

    everything = list(range(num_sources))
    whole = mean_loss(trained(everything, num_steps), test)
    missed = [
        mean_loss(trained([p for p in everything if p != out], num_steps), test) - whole for out in everything
    ]
    half = trained(everything, num_steps // 2)
    found = {}
    for method in InfluenceMethod:
        config = InfluenceConfig(method=method, batch_size=64)
        calculator = create_influence_calculator(half, next_token_loss, config)
        calculator.cache_probe_gradients({"probe": [probe]})
        generator = torch.Generator().manual_seed(seed)
        gradients = [calculator.gradients([draw(chain, 64, generator)]) for chain in chains]
        reference = torch.cat(gradients)
        means = torch.stack([calculator.scores(each, reference=reference).mean() for each in gradients])
        found[method.value] = spearman(means, torch.tensor(missed))
    return found


def planted(seed: int) -> dict[str, float]:
    """(c) What each source costs, final weights, loss against the static mixture (below 0: it won)."""
    chains = planted_chains(seed)
    moving = planted_run(chains, chains["useful"], seed=seed, follow_influence=True)
    static = planted_run(chains, chains["useful"], seed=seed, follow_influence=False)
    return {
        **{
            f"cost of mixing in {name}": cost
            for name, cost in harm(chains, chains["useful"], seed=seed).items()
        },
        **{f"final weight of {name}": weight for name, weight in moving.weights.items()},
        "probe loss, moving − static": moving.probe_loss - static.probe_loss,
    }


def control(seed: int) -> dict[str, float]:
    """(d) How far the weights go from 1/4, and the probe loss against the static mixture."""
    chains = dict.fromkeys(["one", "two", "three", "four"], markov_chain(10 * seed + 1))
    moving = planted_run(chains, chains["one"], seed=seed, follow_influence=True)
    static = planted_run(chains, chains["one"], seed=seed, follow_influence=False)
    return {
        "largest |weight − 1/4|": max(abs(weight - 0.25) for weight in moving.weights.values()),
        "probe loss, moving − static": moving.probe_loss - static.probe_loss,
    }


class Clock(pl.Callback):
    """CPU seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        now = time.process_time()
        self.seconds.append(now - self._mark)
        self._mark = time.process_time()


def cost(seed: int) -> dict[str, float]:
    """Steps of two runs, one of which follows influence, but comes to no update."""
    seconds = {}
    for influence in ("true", "false") if seed % 2 else ("false", "true"):
        clock = Clock()

        def timed(config: Any, callbacks: list[pl.Callback], ranks: Any, clock: Clock, **named: Any) -> Any:
            return lightning_trainer(config, [*callbacks, clock], ranks, **named)

        with (
            tempfile.TemporaryDirectory() as directory,
            mock.patch("wrinklefree.run.lightning_trainer", functools.partial(timed, clock=clock)),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            run(
                load_config(
                    [
                        "experiment=chaos",
                        f"output_dir={directory}",
                        f"training.influence.enabled={influence}",
                        "training.influence.update_interval=1000",
                        "training.balance.interval=1000",
                        "training.validation.num_batches=0",
                        "training.checkpoint.save_interval=1000",
                    ]
                )
            )
        seconds[influence] = clock.seconds
    ratios = [a / b for a, b in zip(seconds["true"][1:], seconds["false"][1:], strict=True)]
    return {
        "a step with influence / without": statistics.median(ratios),
        "milliseconds without": 1e3 * statistics.median(seconds["false"][1:]),
    }


def main() -> None:
    """Print every question's numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    questions: dict[str, Callable[[int], dict[str, float]]] = {
        "steps": lambda seed: {
            **{f"dense: {name}": value for name, value in steps(seed, ternary=False).items()},
            **{f"ternary: {name}": value for name, value in steps(seed, ternary=True).items()},
        },
        "sources": sources,
        "planted": planted,
        "control": control,
        "cost": cost,
    }
    parser.add_argument("--only", choices=questions, action="append", help="one question; may be repeated")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object for each question and seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for question in arguments.only or questions:
        found = [questions[question](seed) for seed in range(arguments.seeds)]
        if arguments.json:
            for seed, values in enumerate(found):
                print(json.dumps({"question": question, "seed": seed, **values}))
            continue
        middle = statistics.median if question == "steps" else statistics.fmean
        print(f"\n{question}: {middle.__name__} over {arguments.seeds} seeds")
        for name in found[0]:
            print(f"  {name:48} {interval([values[name] for values in found], middle)}")


if __name__ == "__main__":
    main()
