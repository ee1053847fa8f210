"""`data score` and `data reweight` on the command line; `register` adds them to the data app."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from durable import ExitCode, UserError, publish_file

if TYPE_CHECKING:
    from torch import nn


def register(app: typer.Typer) -> None:
    """Add both commands to `app`."""
    app.command()(score)
    app.command()(reweight)


def score(
    model: Annotated[str, typer.Argument(help="checkpoint directory or hub name of a decoder")],
    source: Annotated[list[Path], typer.Option(help="directory of a prepared source; once per source")],
    probe: Annotated[list[Path], typer.Option(help="prepared source whose probe counts; once per domain")],
    out: Annotated[Path, typer.Option(help="file to write")] = Path("scores.json"),
    num_samples: Annotated[int, typer.Option(min=2, help="blocks of each source")] = 64,
    block_size: Annotated[int, typer.Option(min=2)] = 512,
    method: str = "datainf",
    layers: Annotated[str, typer.Option(help="embedding, output, both, hidden or all")] = "all",
    seed: int = 42,
) -> None:
    """Score sources by how much training on them would help the probes (higher is better)."""
    from data_handler.influence.config import InfluenceConfig, InfluenceMethod, InfluenceTarget, choice
    from data_handler.influence.scoring import score_sources, score_table, write_scores
    from data_handler.probes import Probe
    from data_handler.shards import Shards

    _require_place(out)  # now, not after the scoring
    prepared = [_prepared(one, "train") for one in source]
    names = [name for name, _ in prepared]
    if len(set(names)) < len(names):
        raise UserError("--source: two directories have the same name", ", ".join(names), "rename one")
    config = InfluenceConfig(
        method=choice(InfluenceMethod, method, "--method"),
        target_layers=choice(InfluenceTarget, layers, "--layers"),
        seed=seed,
    )
    sources = {name: Shards.open(directory) for name, directory in prepared}
    probes = {name: Probe(directory) for name, directory in (_prepared(one, "probe") for one in probe)}
    decoder = _load(model)
    scores = score_sources(
        decoder, sources, probes, num_samples=num_samples, block_size=block_size, config=config
    )
    typer.echo(score_table(scores))
    write_scores(out, scores, sources, domains=list(probes), method=config.method.value)
    typer.echo(f"wrote {out}")


def _require_place(out: Path) -> None:
    if not out.parent.is_dir() or out.is_dir():
        what = f"--out: {out.parent} is no directory" if not out.parent.is_dir() else "--out: is a directory"
        raise UserError(what, out, "give a file in a directory that exists", ExitCode.CANNOT_WRITE)


def _prepared(path: Path, split: str) -> tuple[str, Path]:
    """(name, shards) of what `prepare` wrote as SOURCE, or of a directory of shards by itself."""
    return path.resolve().name, path / split if (path / split).is_dir() else path


def reweight(
    scores: Annotated[Path, typer.Argument(help="file that `data score` wrote")],
    weight: Annotated[
        list[str] | None, typer.Option(help="NAME=WEIGHT now; equal when none is given")
    ] = None,
    min_weight: float = 0.05,
    max_weight: float = 0.60,
    learning_rate: Annotated[float, typer.Option(min=0.0, max=1.0, help="share of the way to go")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="file for the new weights (json)")] = None,
) -> None:
    """Propose mixture weights from scores, and plot them beside the present ones."""
    from data_handler.influence.config import MixtureOptimizationConfig
    from data_handler.influence.scoring import read_scores, reweight_from_scores, weight_plot

    if out is not None:
        _require_place(out)
    found = read_scores(scores)
    weights = _parse_weights(weight) if weight else dict.fromkeys(found, 1 / len(found))
    for name in weights:
        if name not in found:
            raise UserError("--weight: no scores for this source", name, choices=found)
    config = MixtureOptimizationConfig(min_weight=min_weight, max_weight=max_weight)
    update = reweight_from_scores(found, weights, config=config, learning_rate=learning_rate)
    total = sum(weights.values())
    typer.echo(weight_plot({name: value / total for name, value in weights.items()}, update.weights))
    if update.kept_because is not None:
        typer.echo(f"weights stay as they are: {update.kept_because}")
    if out is not None:
        with publish_file(out, replace=True) as file:
            file.write_text(json.dumps(update.to_dict(), indent=1) + "\n", encoding="utf-8")
        typer.echo(f"wrote {out}")


def _parse_weights(given: list[str]) -> dict[str, float]:
    weights = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            weights[name] = float(value)
        except ValueError:
            raise UserError("--weight: must be NAME=WEIGHT", text) from None
        if not 0 <= weights[name] < float("inf"):
            raise UserError("--weight: must be 0 or more", text)
    if sum(weights.values()) <= 0:
        raise UserError("--weight: all weights are 0", ", ".join(given), "give one source more")
    return weights


def _load(name: str) -> "nn.Module":
    """A decoder in fp32; transformers is needed for this command alone."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UserError("data score: needs transformers", fix="pip install 'data-handler[score]'") from None
    if not Path(name).is_dir():
        name = _download(name)
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            name, dtype="float32", attn_implementation="sdpa"
        )
    except (OSError, ValueError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        fix = "give a directory with config.json and model.safetensors, or a hub name"
        raise UserError(
            f"{name}: no decoder that transformers can load", lines[0], fix, ExitCode.BAD_DATA
        ) from None
    return model


def _download(name: str) -> str:
    from huggingface_hub import snapshot_download

    from data_handler.reaching import reach

    return str(reach(name, lambda: snapshot_download(name, allow_patterns=["*.json", "*.safetensors"])))
