"""Batches of tokens that calibration runs a model on.

Shapes: B batch, T tokens, K channels, N = B·T without padding.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from bitnet_arch.walk import config_of
from durable import ExitCode, UserError

Batch = Tensor | Mapping[str, Tensor]
"""Token ids [B, T] or [T], or a dict of model inputs with `input_ids` and perhaps `attention_mask`, whose
zeros are padding.
"""


def model_inputs(batch: Batch, model: nn.Module) -> dict[str, Any]:
    """Keyword arguments for the model, on its device; UserError for what is no batch of its tokens."""
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.ndim not in (1, 2) or ids.numel() == 0:
        raise UserError(
            "A calibration batch is not a tensor of token ids",
            found=f"{type(batch).__name__}"
            if ids is None
            else f"{type(ids).__name__} {tuple(getattr(ids, 'shape', ()))}",
            fix="pass integer tensors shaped [batch, tokens], or dicts with such a tensor under input_ids",
            exit_code=ExitCode.BAD_INPUT,
        )
    vocab_size = config_of(model).vocab_size
    if int(ids.max()) >= vocab_size or int(ids.min()) < 0:
        raise UserError(
            "A calibration batch holds token ids that the model does not have",
            found=f"ids from {int(ids.min())} to {int(ids.max())}",
            fix=f"use the model's own tokenizer: its ids lie below {vocab_size}",
            exit_code=ExitCode.BAD_INPUT,
        )
    device = next(model.parameters()).device
    moved = {
        name: value.to(device)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and name != "labels"
    }
    return moved | {"input_ids": ids.to(device).reshape(-1, ids.shape[-1]), "use_cache": False}


def token_rows(x_BTK: Tensor, mask_BT: Tensor | None) -> Tensor:
    """[N, K]: every token's channels, without padding. A 4-D mask says who sees whom, not what is padding."""
    if mask_BT is not None and mask_BT.ndim == 2 and mask_BT.shape == x_BTK.shape[:2]:
        return x_BTK[mask_BT.bool()]
    return x_BTK.flatten(0, -2)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module comes back to the mode that it was in."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training
