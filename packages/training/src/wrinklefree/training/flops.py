"""How much arithmetic a token costs, and how fast this device multiplies: MFU is what a run makes of it.

    FLOPs of a token = 6 · weights of all linear layers (head included, embeddings not)
                     + 12 · layers · heads · head_dim · length of a block (attention scores and their use)

as in PaLM (arXiv 2204.02311, appendix B): forward and backward of the student, the attention of a block as if
it were not causal. Masked views of a token count as tokens. What else a run does (a teacher's forward pass,
recomputed activations, quantising) is no useful work in this count, so a distilled run shows less. The speed
it is compared with is not a data sheet's but a square matrix product of the same dtype, measured here when
the run begins.
"""

import time
from functools import cache

import torch
from torch import nn

CPU_SIZE, GPU_SIZE = 1024, 4096
REPETITIONS = 3


def flops_per_token(model: nn.Module, block_size: int) -> int | None:
    """None for a model whose attention is not described in its configuration."""
    config = getattr(model, "config", None)
    layers, heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if not isinstance(layers, int) or not isinstance(heads, int):
        return None
    head_dim = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return int(6 * weights + 12 * layers * heads * head_dim * block_size)


@cache
def multiplications_per_second(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOPs per second of a large product, the best of three, measured once; None where nobody knows how."""
    if device.type not in ("cpu", "cuda"):
        return None
    size = CPU_SIZE if device.type == "cpu" else GPU_SIZE
    a = torch.full((size, size), 0.5, device=device, dtype=dtype)
    seconds = []
    with torch.no_grad():
        for _ in range(REPETITIONS + 1):
            _wait_for(device)
            started = time.perf_counter()
            a @ a
            _wait_for(device)
            seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[1:])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
