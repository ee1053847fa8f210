"""Influence against what really happens: a decoder small enough to retrain, sources whose worth is known.

    step truth     one descent step on one example, and the probe's loss before and after
    planted truth  a run whose mixture follows influence, over sources of known worth

`benchmarks/influence.py` prints these; the slow tests bound them.

Shapes: B examples, T positions, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_handler.influence.config import InfluenceConfig, TrackerConfig
from data_handler.influence.datainf import create_influence_calculator
from data_handler.influence.gradients import ExampleLoss, take
from data_handler.influence.tracker import InfluenceTracker

VOCABULARY = 24
LENGTH = 16
EVERY_TOKEN = slice(None)
LOWER_HALF, UPPER_HALF = slice(VOCABULARY // 2), slice(VOCABULARY // 2, None)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Examples of one source."""

    input_ids: Tensor
    """[B, T] int64."""


class TinyDecoder(nn.Module):
    """Embedding, one block over the running mean of what came before, head."""

    def __init__(
        self,
        *,
        vocabulary: int = VOCABULARY,
        width: int = 16,
        inner: int = 32,
        tied: bool = False,
        dropout: float = 0.0,
        make_linear: Callable[[int, int], nn.Module] = lambda k, n: nn.Linear(k, n, bias=False),
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.up = make_linear(2 * width, inner)
        self.down = make_linear(inner, width)
        self.dropout = nn.Dropout(dropout)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        places = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
        past = x.cumsum(dim=1) / places
        x = x + self.down(torch.tanh(self.up(torch.cat([x, past], dim=-1))))
        logits_BTV: Tensor = self.lm_head(self.dropout(x))
        return logits_BTV


def next_token_loss(model: nn.Module, batch: Tokens) -> Tensor:
    """[B] mean loss of every example."""
    logits_BTV = model(batch.input_ids[:, :-1])
    loss_BT = F.cross_entropy(logits_BTV.transpose(1, 2), batch.input_ids[:, 1:], reduction="none")
    return loss_BT.mean(dim=1)


def markov_chain(seed: int, *, sharpness: float = 3.0, tokens: slice = EVERY_TOKEN) -> Tensor:
    """[V, V] transition probabilities, all of them to `tokens`; sharpness 0 is uniform noise."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64)
    outside = torch.full((VOCABULARY,), -torch.inf, dtype=torch.float64)
    outside[tokens] = 0.0
    return torch.softmax(sharpness * logits + outside, dim=1)


def planted_chains(seed: int) -> dict[str, Tensor]:
    """Sources of known worth to a probe that is like `useful`, the best first.

    `neutral` has tokens that the probe never has, so it teaches nothing about the probe's; `garbage` gives
    each of the probe's tokens the same chance; `contrary` has them, too, and is sure of other successions.
    """
    return {
        "useful": markov_chain(4 * seed, tokens=LOWER_HALF),
        "neutral": markov_chain(4 * seed + 1, tokens=UPPER_HALF),
        "garbage": markov_chain(4 * seed + 2, sharpness=0.0, tokens=LOWER_HALF),
        "contrary": markov_chain(4 * seed + 3, tokens=LOWER_HALF),
    }


def draw(chain: Tensor, num: int, generator: torch.Generator) -> Tokens:
    """`num` walks of `LENGTH` tokens, which begin where a step from any token leads."""
    ids = [torch.randint(0, VOCABULARY, (num,), generator=generator)]
    for _ in range(LENGTH):
        ids.append(torch.multinomial(chain[ids[-1]], 1, generator=generator).squeeze(1))
    return Tokens(torch.stack(ids[1:], dim=1))


def join(batches: list[Tokens]) -> Tokens:
    """One batch of all examples."""
    return Tokens(torch.cat([batch.input_ids for batch in batches]))


def step_truth(
    model: nn.Module, loss: ExampleLoss, examples: object, probe: object, *, count: int, rate: float
) -> Tensor:
    """[count] fall of the probe's loss, over `rate`, after a step on each of the first `count` examples."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        before = loss(model, probe).mean()
    falls = []
    for index in range(count):
        grads = torch.autograd.grad(loss(model, take(examples, slice(index, index + 1))).sum(), parameters)
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.sub_(rate * grad)
            falls.append((before - loss(model, probe).mean()) / rate)
            for parameter, old in zip(parameters, saved, strict=True):
                parameter.copy_(old)
    return torch.stack(falls)


def spearman(one: Tensor, other: Tensor) -> float:
    """Rank correlation of two lists without ties."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def train(model: nn.Module, draws: Callable[[int], Tokens], *, steps: int, rate: float = 0.01) -> None:
    """Adam on the batch of each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for step in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(next_token_loss(model, draws(step)).mean())
        optimizer.step()


def mean_loss(model: nn.Module, batch: Tokens) -> float:
    """Over all examples."""
    with torch.no_grad():
        return float(next_token_loss(model, batch).mean())


def harm(
    chains: Mapping[str, Tensor], probe_chain: Tensor, *, seed: int, steps: int = 120
) -> dict[str, float]:
    """Source → what mixing in as much of it costs the probe's loss, by training with it and without."""
    held_out = draw(probe_chain, 1024, torch.Generator().manual_seed(20_000 + seed))

    def trained(mixed: list[Tensor]) -> float:
        torch.manual_seed(seed)
        model, generators = TinyDecoder(), [torch.Generator().manual_seed(seed + n) for n in range(2)]
        parts = list(zip(mixed, generators, strict=False))
        train(
            model, lambda step: join([draw(chain, 16, generator) for chain, generator in parts]), steps=steps
        )
        return mean_loss(model, held_out)

    alone = trained([probe_chain])
    return {name: trained([probe_chain, chain]) - alone for name, chain in chains.items()}


@dataclass(frozen=True, slots=True)
class PlantedRun:
    """How a run ended."""

    weights: dict[str, float]
    probe_loss: float
    num_updates: int


def planted_run(
    chains: Mapping[str, Tensor],
    probe_chain: Tensor,
    *,
    seed: int,
    follow_influence: bool,
    steps: int = 120,
    batch_size: int = 32,
    examples_per_source: int = 48,
    tracker_config: TrackerConfig | None = None,
) -> PlantedRun:
    """Train on a mixture that starts uniform; with `follow_influence` its weights move every 20 steps."""
    torch.manual_seed(seed)
    model = TinyDecoder()
    generator = torch.Generator().manual_seed(seed)
    probe = draw(probe_chain, 128, torch.Generator().manual_seed(10_000 + seed))
    held_out = draw(probe_chain, 512, torch.Generator().manual_seed(20_000 + seed))
    calculator = create_influence_calculator(model, next_token_loss, InfluenceConfig(batch_size=64))

    def score() -> dict[str, Tensor]:
        calculator.cache_probe_gradients({"probe": [probe]})
        drawn = {name: draw(chain, examples_per_source, generator) for name, chain in chains.items()}
        gradients = {name: calculator.gradients([batch]) for name, batch in drawn.items()}
        reference = torch.cat(list(gradients.values()))
        return {name: calculator.scores(each, reference=reference) for name, each in gradients.items()}

    config = tracker_config or TrackerConfig(warmup_steps=20, update_interval=20, learning_rate=0.5)
    config.enabled = follow_influence
    tracker = InfluenceTracker(config, dict.fromkeys(chains, 1.0), score)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(1, steps + 1):
        shares = torch.tensor([tracker.weights[name] for name in chains], dtype=torch.float64)
        counts = torch.bincount(
            torch.multinomial(shares, batch_size, True, generator=generator), minlength=len(chains)
        )
        batch = join([draw(c, int(n), generator) for c, n in zip(chains.values(), counts, strict=True)])
        optimizer.zero_grad()
        torch.autograd.backward(next_token_loss(model, batch).mean())
        optimizer.step()
        tracker.on_step_end(step, step * batch_size)
    return PlantedRun(dict(tracker.weights), mean_loss(model, held_out), len(tracker.get_weight_history()))
