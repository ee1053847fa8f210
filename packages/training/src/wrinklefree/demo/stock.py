"""Have a process that knows transformers alone read a checkpoint, and compare its distributions with ours."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from durable import ExitCode, UserError

MOST_KL = 1e-5
"""Nats per position: moving the gain of a norm into the next one is exact up to its eps."""


@dataclass(frozen=True, slots=True)
class StockReading:
    """What stock transformers made of a checkpoint."""

    description: str
    kl: float
    """Mean KL divergence to our own model, nats per position."""
    largest_difference: float
    """The largest difference of a logit, relative to the largest logit."""


def read_with_stock_transformers(
    checkpoint_dir: Path, model: PreTrainedModel, token_ids: Tensor
) -> StockReading:
    """Compare in a child process; raises when the distributions differ."""
    with torch.no_grad():
        ours = model(input_ids=token_ids, use_cache=False).logits
    theirs, description = _logits_of_a_stock_process(checkpoint_dir, token_ids)
    reading = StockReading(
        description, _kl(ours, theirs), ((ours - theirs).abs().max() / ours.abs().max()).item()
    )
    if not reading.kl <= MOST_KL:
        raise UserError(
            f"{checkpoint_dir}: stock transformers computes other distributions",
            found=f"KL {reading.kl:.2g} nats per position, {MOST_KL:g} allowed",
            exit_code=ExitCode.BAD_DATA,
        )
    return reading


def _logits_of_a_stock_process(checkpoint_dir: Path, token_ids: Tensor) -> tuple[Tensor, str]:
    script = Path(__file__).with_name("stock_reader.py")
    tokens_path = checkpoint_dir.parent / "tokens.safetensors"
    logits_path = checkpoint_dir.parent / "logits.safetensors"
    save_file({"input_ids": token_ids.contiguous()}, tokens_path)
    # transformers compiles its quantisers at first call, which needs a C++ compiler and ten seconds.
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    try:
        child = subprocess.run(
            [sys.executable, "-P", str(script), str(checkpoint_dir), str(tokens_path), str(logits_path)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode != 0:
            raise UserError(
                f"{checkpoint_dir}: stock transformers cannot read it",
                found=(child.stderr.strip().splitlines() or ["no message"])[-1],
                exit_code=ExitCode.BAD_DATA,
            )
        logits = load_file(logits_path)["logits"]
    finally:
        tokens_path.unlink(missing_ok=True)
        logits_path.unlink(missing_ok=True)
    told = json.loads(child.stdout.strip().splitlines()[-1])
    return logits, f"transformers {told['version']}, {told['model']} of {told['layer']}"


def _kl(ours: Tensor, theirs: Tensor) -> float:
    log_ours, log_theirs = (F.log_softmax(logits.double(), dim=-1) for logits in (ours, theirs))
    return F.kl_div(log_theirs, log_ours, reduction="none", log_target=True).sum(-1).mean().item()
