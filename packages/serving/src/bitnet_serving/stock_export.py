"""Export a checkpoint as a directory that plain transformers loads, with no code of ours.

    from bitnet_serving.stock_export import export_hf

    print(export_hf("outputs/run", "my-model", packed=True))

`bitnet_arch.stock` has the layout. Beside it go the tokenizer's files as they are, and a model card with the
numbers of the run.
"""

import json
import shutil
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from bitnet_arch import load_bitnet, set_quant_amount, set_subln_amount
from bitnet_arch.checkpoint import CheckpointFiles, checkpoint_files
from bitnet_arch.record import read_record
from bitnet_serving.checkpoint_source import newest_of_run, refuse_unfinished
from bitnet_serving.run_numbers import RunNumbers, read_run_numbers
from durable import UserError, publish, read_manifest

CARD_NAME = "README.md"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""What a tokenizer may be saved as. Nothing else of a checkpoint leaves it: not its optimizer, not its
configuration.
"""
KEPT_METADATA = ("step", "stage")


@dataclass(frozen=True, slots=True, kw_only=True)
class StockReport:
    """What was written."""

    path: Path
    architecture: str
    """The class of transformers that loads it."""
    packed: bool
    numbers: RunNumbers | None
    files: dict[str, int]
    """Name → bytes."""

    def __str__(self) -> str:
        weights = "packed, four to a byte" if self.packed else "latent, quantised as they run"
        size = sum(self.files.values()) / 1e6
        lines = [f"{self.path}: {size:,.1f} MB, {self.architecture} of plain transformers, weights {weights}"]
        if self.numbers is None:
            lines.append("  no numbers in its model card: the checkpoint does not lie in a run")
        return "\n".join([*lines, list_files(self.files)])


def export_hf(
    checkpoint: str | PathLike[str],
    out: str | PathLike[str],
    *,
    packed: bool = False,
    at_full_quantisation: bool = False,
    replace_existing: bool = False,
) -> StockReport:
    """Write a checkpoint (or the newest one of a run) to the directory `out`."""
    source = newest_of_run(Path(checkpoint))
    files = _stock_files(source, packed=packed, at_full_quantisation=at_full_quantisation)
    numbers = read_run_numbers(source)
    files.texts[CARD_NAME] += "" if numbers is None else numbers.to_markdown()
    found = read_manifest(source).metadata
    metadata = {key: found[key] for key in KEPT_METADATA if key in found}
    target = Path(out)
    with publish(
        target, replace=replace_existing and target.exists(), metadata=metadata, bytes_needed=files.num_bytes
    ) as temporary:
        files.write(temporary)
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, temporary / name)
    return StockReport(
        path=target,
        architecture=json.loads(files.texts["config.json"])["architectures"][0],
        packed=packed,
        numbers=numbers,
        files={path.name: path.stat().st_size for path in sorted(target.iterdir())},
    )


def list_files(files: dict[str, int]) -> str:
    """A line for each."""
    width = max(map(len, files), default=0)
    return "\n".join(f"  {name:<{width}}  {size:>15,} bytes" for name, size in files.items())


def _stock_files(source: Path, *, packed: bool, at_full_quantisation: bool) -> CheckpointFiles:
    model = load_bitnet(source)
    record = read_record(source)
    refuse_unfinished(source, record, allowed=at_full_quantisation)
    if record.packed and not packed:
        raise UserError(f"{source}: has packed weights, and no latent ones", fix="add --packed")
    if at_full_quantisation and not record.packed:
        set_quant_amount(model, 1.0)
        set_subln_amount(model, 1.0)
    return checkpoint_files(model, layout="stock", packed=packed)
