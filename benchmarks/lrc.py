"""Does a low-rank correction buy more than its bytes buy as 8-bit weights?

    uv run python benchmarks/lrc.py                  three seeds, a few minutes
    uv run python benchmarks/lrc.py --init svd       another start of U and V

For each seed a tiny decoder learns the demo's four sources in full precision, becomes ternary (stage 2), and
gets a correction of U and V that is trained to give the hidden states of the full-precision model
(`training=lrc_calibration`), all by the product's own stages. Beside it the same bytes are spent on 8-bit
weights: as many projections as they pay for leave ternary for int8, chosen greedily by held-out loss, the
best number of them, none included. Held-out loss is the mean over the sources' probes, int8 activations on.
"""

import argparse
import copy
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from bitnet_arch import BitLinearLRC, load_bitnet, set_quant_amount
from bitnet_arch.bitlinear import BitLinear
from bitnet_arch.quant import quantize_weight
from data_handler import Batch
from data_handler.demo import TOKENIZER_DIR
from wrinklefree.config import RunConfig, load_config
from wrinklefree.pretrained import load_pretrained
from wrinklefree.run import RunResult, run
from wrinklefree.training.data import PreparedData, open_loader, prepare_data
from wrinklefree.training.evaluation import held_out_losses

LENGTH, BATCH = 64, 8
BYTES_OF_A_FACTOR = 2
"""U and V as fp16."""
TERNARY, EIGHT = 2 / 8, 1.0
"""Bytes of a weight."""


def overrides(directory: Path, seed: int, preset: str, steps: int, *more: str) -> list[str]:
    return [
        "model.name=tiny",
        f"model.pretrained_name={directory / 'dense'}",
        "model.tokenizer=demo",
        "data=demo",
        f"training={preset}",
        f"seed={seed}",
        f"output_dir={directory}",
        f"training.max_steps={steps}",
        f"training.max_seq_length={LENGTH}",
        f"training.batch_size={BATCH}",
        "training.gradient_accumulation_steps=1",
        "training.validation.num_batches=0",
        f"training.checkpoint.save_interval={steps}",
        "training.logging.log_interval=100000",
        *more,
    ]


def train_dense(config: RunConfig, data: PreparedData, directory: Path, seed: int, steps: int) -> nn.Module:
    """In full precision, next tokens, AdamW; saved as a pretrained model."""
    torch.manual_seed(seed)
    model = load_pretrained("tiny_llama").model
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    with open_loader(config, data, num_samples=steps * BATCH) as loader:
        for batch in loader:
            _loss(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.save_pretrained(directory)
    for file in TOKENIZER_DIR.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return model


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    from wrinklefree.objectives import ContinuePretrainObjective, ObjectiveManager

    manager = ObjectiveManager({"continue_pretrain": ContinuePretrainObjective()})
    return manager.step(model, None, batch, manager.counts(batch)).loss


def held_out(model: nn.Module, data: PreparedData) -> float:
    losses = held_out_losses(model, data.probes(), block_size=LENGTH, batch_size=16, num_batches=4)
    return statistics.mean(losses.values())


def final(result: RunResult) -> nn.Module:
    model: nn.Module = load_bitnet(result.directory / "checkpoints" / "final")
    return model.eval()


def as_eight_bits(model: nn.Module, paths: list[str]) -> nn.Module:
    """A copy whose projections at these paths have int8 weights, one scale each, beside int8 activations."""
    copied = copy.deepcopy(model)
    for path in paths:
        layer = copied.get_submodule(path)
        assert isinstance(layer, BitLinear)
        weight = layer.weight.detach()
        scale = weight.abs().max() / 127
        with torch.no_grad():
            layer.weight.copy_((weight / scale).round() * scale)
        layer.quant_amount = 0.0
        layer.activation_amount = 1.0
    return copied


def best_upgrade(model: nn.Module, data: PreparedData, num_bytes: float) -> tuple[float, int]:
    """Held-out loss of the best greedy choice of 8-bit projections for so many bytes, and their number."""
    layers = [(path, each) for path, each in model.named_modules() if isinstance(each, BitLinear)]
    sizes = {path: layer.weight.numel() * (EIGHT - TERNARY) for path, layer in layers}
    chosen: list[str] = []
    best = (held_out(model, data), 0)
    left = num_bytes
    while True:
        able = [path for path in sizes if path not in chosen and sizes[path] <= left]
        if not able:
            return best
        losses = {path: held_out(as_eight_bits(model, [*chosen, path]), data) for path in able}
        cheapest = min(losses, key=lambda path: (losses[path], path))
        chosen.append(cheapest)
        left -= sizes[cheapest]
        best = min(best, (losses[cheapest], len(chosen)))


def one_seed(seed: int, options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "dense").mkdir()
        config = load_config(["model=tiny_llama", *overrides(directory, seed, "base", options.dense)[2:]])
        data = prepare_data(config)
        dense = train_dense(config, data, directory / "dense", seed, options.dense)
        learning = ["training.optimizer.lr_muon=0.01", "training.optimizer.lr_adam=1e-3"]
        ternary = final(
            run(load_config(overrides(directory, seed, "stage2_pretrain", options.ternary, *learning)))
        )
        set_quant_amount(ternary, 1.0)
        more = [
            f"training.lrc.init={options.init}",
            f"training.optimizer.lr={options.lr}",
            "training.objectives.continue_pretrain.weight=0",
        ]
        corrected = final(
            run(load_config(overrides(directory, seed, "lrc_calibration", options.steps, *more)))
        )
        layers = [layer for layer in corrected.modules() if isinstance(layer, BitLinearLRC)]
        num_bytes = sum(
            BYTES_OF_A_FACTOR * layer.rank * (layer.in_features + layer.out_features) for layer in layers
        )
        zeros = statistics.mean(
            float((quantize_weight(layer.weight).codes == 0).float().mean()) for layer in layers
        )
        upgraded, num_upgraded = best_upgrade(ternary, data, num_bytes)
        return {
            "full precision": held_out(dense.eval(), data),
            "ternary": held_out(ternary, data),
            "corrected": held_out(corrected, data),
            "8-bit": upgraded,
            "upgraded": num_upgraded,
            "bytes": num_bytes,
            "ternary bytes": sum(layer.weight.numel() for layer in layers) * TERNARY,
            "zeros": zeros,
        }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dense", type=int, default=1500, help="steps in full precision")
    parser.add_argument("--ternary", type=int, default=100, help="steps of stage 2")
    parser.add_argument("--steps", type=int, default=200, help="steps of the correction")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--init", choices=["svd", "calibrated", "kaiming"], default="kaiming")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [one_seed(seed, options) for seed in range(options.seeds)]
    print(
        "\n| seed | full precision | ternary | + correction | + 8-bit weights | bytes, of the ternary ones |"
    )
    print("|---|---|---|---|---|---|")
    for seed, row in enumerate(found):
        print(
            f"| {seed} | {row['full precision']:.4f} | {row['ternary']:.4f} | {row['corrected']:.4f} | "
            f"{row['8-bit']:.4f} ({row['upgraded']:.0f} projections) | "
            f"{row['bytes']:,.0f}, {row['bytes'] / row['ternary bytes']:.2f} × |"
        )
    gains = [row["ternary"] - row["corrected"] for row in found]
    bought = [row["ternary"] - row["8-bit"] for row in found]
    print()
    for name, falls in (("the correction", gains), ("8-bit weights", bought)):
        mean, least, most = statistics.mean(falls), min(falls), max(falls)
        print(f"held-out loss falls by {mean:.4f} ({least:.4f} to {most:.4f}) with {name}")
    return 0 if all(gain > other for gain, other in zip(gains, bought, strict=True)) else 1


if __name__ == "__main__":
    sys.exit(main())
