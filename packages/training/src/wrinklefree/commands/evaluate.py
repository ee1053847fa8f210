"""`wrinklefree eval`: the held-out loss of a checkpoint by domain, as it was saved and at λ = μ = 1."""

import math
from pathlib import Path
from typing import Any

from bitnet_arch import load_bitnet, set_quant_amount, set_subln_amount
from data_handler.demo import TOKENIZER_DIR
from durable import ExitCode, UserError
from wrinklefree.config import load_config
from wrinklefree.training.checkpoint import read_train_state
from wrinklefree.training.data import prepare_data
from wrinklefree.training.evaluation import held_out_losses
from wrinklefree.training.run_directory import find_checkpoint


def evaluate(path: Path, *, data: str | None, num_batches: int) -> None:
    """Print a table of losses and perplexities."""
    checkpoint = find_checkpoint(str(path))
    state = read_train_state(checkpoint)
    keys: dict[str, Any] = state.config["keys"]
    overrides = [
        f"model.tokenizer={_tokenizer(keys, checkpoint)}",
        f"data.config_name={data or keys['data']['config_name']}",
    ]
    if data is None and keys["data"]["directory"] is not None:
        overrides.append(f"data.directory={keys['data']['directory']}")
    probes = prepare_data(load_config(overrides)).probes()
    if not probes:
        raise UserError(
            "eval: no source of this data config holds out a probe",
            data or keys["data"]["config_name"],
            "name another with --data",
            ExitCode.BAD_DATA,
        )
    model = load_bitnet(checkpoint)
    columns = {}
    for title, amount in (("as saved", None), ("at λ = μ = 1", 1.0)):
        if amount is not None:
            set_quant_amount(model, amount)
            set_subln_amount(model, amount)
        columns[title] = held_out_losses(
            model,
            probes,
            block_size=keys["training"]["max_seq_length"],
            batch_size=8,
            num_batches=num_batches,
        )
    print(f"{checkpoint}, step {state.step}")
    print(_table(columns))


def _tokenizer(keys: dict[str, Any], checkpoint: Path) -> str:
    """Data is prepared with the tokenizer of the run, which its checkpoints carry."""
    if keys["model"]["tokenizer"] is not None:
        return str(keys["model"]["tokenizer"])
    has_one = (checkpoint / "tokenizer.json").is_file()
    return str(checkpoint.resolve() if has_one else TOKENIZER_DIR)


def _table(columns: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(columns.values())))
    width = max(len(name) for name in [*names, "mean"])
    lines = [" " * width + "".join(f"  {title:>24}" for title in columns)]
    lines.append(" " * width + "  " + "  ".join(f"{'loss':>10}{'perplexity':>14}" for _ in columns))
    for name in [*names, "mean"]:
        cells = []
        for losses in columns.values():
            value = losses[name] if name in losses else sum(losses.values()) / len(losses)
            cells.append(f"{value:>10.4f}{math.exp(min(value, 700.0)):>14.4g}")
        lines.append(f"{name:{width}}  " + "  ".join(cells))
    return "\n".join(lines)
