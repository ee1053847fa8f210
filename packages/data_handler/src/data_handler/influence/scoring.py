"""Scores of prepared sources against prepared probes, as a file; and weights from such a file.

    scores.json   {format_version, method, domains, sources: {name: {directory, scores: […]}}}

Higher is better. A draw of blocks is a function of (seed, source): equal on every machine.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_handler.influence.config import InfluenceConfig, MixtureOptimizationConfig
from data_handler.influence.datainf import create_influence_calculator
from data_handler.influence.language import language_loss
from data_handler.influence.reweight import MixtureWeightCalculator, WeightUpdate
from data_handler.packing import pack_blocks
from data_handler.permutation import key_of, permuted
from data_handler.probes import Probe
from data_handler.shards import Shards
from data_handler.types import Batch
from durable import ExitCode, UserError, publish_file

FORMAT_VERSION = 1
BAR_WIDTH = 40


def draw_blocks(
    shards: Shards, *, num_samples: int, block_size: int, batch_size: int, seed: int
) -> Iterator[Batch]:
    """`num_samples` different blocks of a source, at random places."""
    available = shards.num_tokens // block_size
    if not 0 < num_samples <= available:
        raise UserError(
            f"{shards.directory}: has {available} blocks of {block_size} tokens",
            f"{num_samples} wanted",
            "score fewer samples, use shorter blocks, or prepare more",
            ExitCode.BAD_DATA,
        )
    key = key_of("influence", seed, shards.header.source)
    blocks = permuted(np.arange(num_samples), available, key)
    for first in range(0, num_samples, batch_size):
        chosen = blocks[first : first + batch_size]
        yield pack_blocks(
            {0: shards},
            source_id=np.zeros(len(chosen), np.int64),
            starts=chosen * block_size,
            sample_id=chosen,
            block_size=block_size,
        )


def score_sources(
    model: nn.Module,
    sources: Mapping[str, Shards],
    probes: Mapping[str, Probe],
    *,
    num_samples: int,
    block_size: int,
    config: InfluenceConfig | None = None,
    domain_weights: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """Source → scores [num_samples]; the probes' first `num_samples` blocks (or all) are the measure."""
    config = config or InfluenceConfig()
    _require_vocabulary(model, [*sources.values(), *(probe.shards for probe in probes.values())])
    calculator = create_influence_calculator(model, language_loss, config)
    calculator.cache_probe_gradients(
        {
            domain: probe.batches(
                block_size=block_size,
                batch_size=config.batch_size,
                num_samples=min(num_samples, max(1, probe.shards.num_tokens // block_size)),
            )
            for domain, probe in probes.items()
        }
    )
    gradients = {
        name: calculator.gradients(
            draw_blocks(
                shards,
                num_samples=num_samples,
                block_size=block_size,
                batch_size=config.batch_size,
                seed=config.seed,
            )
        )
        for name, shards in sources.items()
    }
    reference = torch.cat(list(gradients.values()))
    return {
        name: calculator.scores(each, reference=reference, domain_weights=domain_weights)
        for name, each in gradients.items()
    }


def _require_vocabulary(model: nn.Module, every: list[Shards]) -> None:
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    for shards in every:
        if vocab_size is not None and shards.header.vocab_size > vocab_size:
            raise UserError(
                f"{shards.directory}: was prepared for a vocabulary of {shards.header.vocab_size}",
                f"a model with {vocab_size}",
                "prepare the data with the model's tokenizer",
                ExitCode.BAD_DATA,
            )


def write_scores(
    path: Path,
    scores: Mapping[str, Tensor],
    sources: Mapping[str, Shards],
    *,
    domains: list[str],
    method: str,
) -> None:
    """Write scores.json."""
    listed = {
        name: {"directory": str(sources[name].directory), "scores": values.tolist()}
        for name, values in scores.items()
    }
    content = {"format_version": FORMAT_VERSION, "method": method, "domains": domains, "sources": listed}
    with publish_file(path, replace=True) as file:
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_scores(path: Path) -> dict[str, Tensor]:
    """Source → scores; UserError (exit code 4) for any other file."""
    fix = "write one with `data score`"
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: no readable scores file", type(error).__name__, fix, ExitCode.BAD_DATA
        ) from None
    try:
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError
        found = {
            str(name): torch.tensor(entry["scores"], dtype=torch.float64)
            for name, entry in content["sources"].items()
        }
        if not found or any(values.dim() != 1 for values in found.values()):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError):
        what = f"{path}: not a scores file of version {FORMAT_VERSION}"
        raise UserError(what, None, fix, ExitCode.BAD_DATA) from None
    return found


def reweight_from_scores(
    scores: Mapping[str, Tensor],
    weights: Mapping[str, float],
    *,
    config: MixtureOptimizationConfig | None = None,
    learning_rate: float = 1.0,
) -> WeightUpdate:
    """One update of `weights` by `scores`."""
    calculator = MixtureWeightCalculator(weights, config)
    return calculator.compute_mixture_weights(calculator.base, scores, learning_rate=learning_rate)


def score_table(scores: Mapping[str, Tensor]) -> str:
    """One line per source: mean score, its standard error, share of examples that help; the best first."""
    width = max(map(len, scores))
    lines = [f"{'source':{width}}  {'mean score':>12}  {'± error':>10}  helpful"]
    for name, values in sorted(scores.items(), key=lambda item: -float(item[1].mean())):
        error = float(values.std()) / values.numel() ** 0.5 if values.numel() > 1 else float("nan")
        helpful = float((values > 0).double().mean())
        lines.append(f"{name:{width}}  {float(values.mean()):12.4g}  {error:10.2g}  {helpful:6.0%}")
    return "\n".join(lines)


def weight_plot(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Two bars per source: the weight before (light) and after (full)."""
    width = max(map(len, before))
    lines = []
    for name, old in before.items():
        new = after[name]
        lines.append(f"{name:{width}}  {'░' * round(old * BAR_WIDTH):{BAR_WIDTH}} {old:.3f}")
        lines.append(f"{'':{width}}  {'█' * round(new * BAR_WIDTH):{BAR_WIDTH}} {new:.3f} {new - old:+.3f}")
    return "\n".join(lines)
