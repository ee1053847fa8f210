"""`wrinklefree convert`: a pretrained decoder in, a ternary checkpoint out, with a report of what was done.

    check the target ─► open ─► convert in place ─► save through `durable` ─► report with measured sizes

Shapes: B = 1 sequence of T tokens per calibration batch.
"""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bitnet_arch import ConversionConfig, ConversionReport, convert_to_bitnet, save_bitnet
from bitnet_serving import read_sizes
from durable import ExitCode, UserError
from wrinklefree.pretrained import Pretrained, load_pretrained
from wrinklefree.terminal import megabytes, table

CALIBRATION_BATCHES = 8
CALIBRATION_TOKENS = 512


def convert(
    name: str,
    out_dir: Path,
    *,
    subln: Literal["off", "output", "all"],
    init: Literal["ones", "calibrated"],
    calibration: Path | None,
    hidden_act: Literal["keep", "relu2"],
    exclude: tuple[str, ...],
    layout: Literal["training", "stock"],
    packed: bool,
) -> None:
    """Convert the decoder called `name`, save it to `out_dir`, print what was done."""
    check_options(subln=subln, init=init, calibration=calibration, layout=layout, packed=packed)
    check_target(out_dir)
    pretrained = load_pretrained(name)
    config = ConversionConfig(
        exclude=exclude,
        subln="none" if subln == "off" else subln,
        subln_init=init,
        calibration_batches=calibration_batches(pretrained, calibration) if calibration else None,
        hidden_act=hidden_act,
    )
    report = convert_to_bitnet(pretrained.model, config)
    save_bitnet(pretrained.model, out_dir, layout=layout, packed=packed, tokenizer=pretrained.tokenizer)
    print_report(report, pretrained.source, out_dir)
    if report.subln_inserted and init == "ones":
        print(
            "note: new norms with gains of one do not keep what a pretrained model knows; "
            "train it, or calibrate them: --init calibrated --calibration TEXT_FILE"
        )


def check_options(*, subln: str, init: str, calibration: Path | None, layout: str, packed: bool) -> None:
    """Refuse combinations that would do nothing, before anything is loaded."""
    if packed and layout != "stock":
        raise UserError(
            "--packed: only the stock layout is packed", found=f"--layout {layout}", fix="add --layout stock"
        )
    if init == "calibrated" and subln == "off":
        raise UserError(
            "--init calibrated: there is no norm to calibrate", found="--subln off", fix="add --subln output"
        )
    if (init == "calibrated") != (calibration is not None):
        raise UserError(
            "--init calibrated and --calibration FILE belong together", fix="give both or neither"
        )
    if calibration is not None and not calibration.is_file():
        raise UserError(f"{calibration}: no such file", fix="name a text file for --calibration")


def check_target(out_dir: Path) -> None:
    """Refuse a target that cannot be written, or that something lies in, before anything is loaded."""
    try:
        if out_dir.is_dir() and any(out_dir.iterdir()):
            raise UserError(f"{out_dir}: not empty", fix="choose a new directory, or move this one away")
        if out_dir.exists() and not out_dir.is_dir():
            raise UserError(f"{out_dir}: a file is in the way", fix="choose a new directory")
        ancestor = next(parent for parent in out_dir.absolute().parents if parent.exists())
    except OSError as error:
        raise UserError(
            f"{out_dir}: cannot be written", found=error.strerror, exit_code=ExitCode.CANNOT_WRITE
        ) from None
    if not (ancestor.is_dir() and os.access(ancestor, os.W_OK)):
        raise UserError(
            f"{out_dir}: cannot be written",
            found=f"{ancestor} is not a writable directory",
            exit_code=ExitCode.CANNOT_WRITE,
        )


def calibration_batches(pretrained: Pretrained, path: Path) -> list[Tensor]:
    """The beginning of a text as batches [1, T] of token ids."""
    if pretrained.tokenizer is None:
        raise UserError(
            "--calibration: this model has no tokenizer", found=pretrained.source, fix="use --init ones"
        )
    text = path.read_text(errors="replace")[: 16 * CALIBRATION_BATCHES * CALIBRATION_TOKENS]
    token_ids = torch.tensor(pretrained.tokenizer(text)["input_ids"])
    if len(token_ids) < 16:
        raise UserError(
            f"{path}: too short to calibrate on", found=f"{len(token_ids)} tokens", fix="give it 16 or more"
        )
    return [
        chunk[None] for chunk in token_ids.split(CALIBRATION_TOKENS)[:CALIBRATION_BATCHES] if len(chunk) >= 16
    ]


def print_report(report: ConversionReport, source: str, out_dir: Path) -> None:
    """What was converted, kept and skipped, and what the files weigh."""
    norms = len(report.subln_inserted), len(report.subln_adopted)
    rows = [
        ("model", f"{source}: {report.family}, {report.parameters:,} parameters"),
        ("ternary", f"{len(report.converted)} projections, {report.ternary_parameters:,} parameters"),
        ("left dense", _counted(report.skipped.values(), "projections ") or "none"),
        ("kept", _counted(path.rpartition(".")[2] for path in report.kept)),
        ("SubLN", f"{norms[0]} inserted, {norms[1]} of the architecture's own adopted"),
        ("activation", report.hidden_act),
    ]
    print(table(rows, indent=0))
    print()
    print(read_sizes(out_dir))
    print(f"saved {out_dir}: {megabytes(sum(file.stat().st_size for file in out_dir.rglob('*')))}")


def _counted(names: Iterable[str], what: str = "") -> str:
    """`2 × norm, head`: thirty layers need no thirty names."""
    counts = Counter(names)
    each = [(f"{count} × " if count > 1 else "") + what + name for name, count in counts.items()]
    return ", ".join(each)
