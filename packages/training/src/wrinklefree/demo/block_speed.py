"""A training step of a decoder block, ternary against dense: one process, alternating, one thread, medians.

The block has SmolLM2-135M's shape. Time is CPU time of this process, so that a busy machine disturbs little.

Shapes: x [B, T, H] with B = 4 sequences of T = 256 tokens.
"""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bitnet_arch import convert_to_bitnet

SMOLLM2_BLOCK = LlamaConfig(
    vocab_size=16,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=1,
    num_attention_heads=9,
    num_key_value_heads=3,
)


@dataclass(frozen=True, slots=True)
class StepSpeed:
    """Seconds per step of both, over all repetitions."""

    dense_seconds: list[float]
    ternary_seconds: list[float]

    @property
    def ratio(self) -> float:
        """How many times faster the ternary step is: above 1 is faster, below 1 slower."""
        return statistics.median(self.dense_seconds) / statistics.median(self.ternary_seconds)

    def __str__(self) -> str:
        dense, ternary = (
            statistics.median(seconds) * 1000 for seconds in (self.dense_seconds, self.ternary_seconds)
        )
        return f"dense {dense:.3g} ms, ternary {ternary:.3g} ms"


def compare_step_speed(
    config: LlamaConfig = SMOLLM2_BLOCK, *, batch_size: int = 4, num_tokens: int = 256, repetitions: int = 7
) -> StepSpeed:
    """Measure forward, backward and AdamW of the same blocks, dense and ternary."""
    steps = []
    for is_ternary in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(config).train()
            x = torch.randn(batch_size, num_tokens, config.hidden_size)
        if is_ternary:
            convert_to_bitnet(model)
        steps.append(_Step(model, x))
    times = [[step.seconds() for step in steps] for _ in range(repetitions + 2)][2:]
    return StepSpeed([dense for dense, _ in times], [ternary for _, ternary in times])


class _Step:
    """One optimizer step on inputs that stay."""

    def __init__(self, model: LlamaForCausalLM, x: Tensor) -> None:
        self.model = model
        self.x = x.requires_grad_()
        self.optimizer = torch.optim.AdamW(model.model.layers.parameters(), lr=1e-4, fused=True)

    def seconds(self) -> float:
        started = time.process_time()
        self.model.model(inputs_embeds=self.x, use_cache=False).last_hidden_state.square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.x.grad = None
        return time.process_time() - started
