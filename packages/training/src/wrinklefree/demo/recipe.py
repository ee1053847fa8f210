"""The demo's decoder and its training: ternary from the first step (λ = 1), on questions that never repeat.

Shapes: B questions, T = 18 tokens, V = 12 characters.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bitnet_arch import ConversionConfig, ConversionReport, convert_to_bitnet
from data_handler.sorting import CHARACTERS, IGNORED_LABEL, Batch, sorting_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides the demo's numbers."""

    hidden_size: int = 96
    intermediate_size: int = 192
    num_layers: int = 2
    num_heads: int = 4
    batch_size: int = 64
    steps: int = 320
    warmup_steps: int = 30
    learning_rate: float = 4e-3
    seed: int = 0

    def model_config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=len(CHARACTERS),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            tie_word_embeddings=True,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=CHARACTERS.index("\n"),
        )

    def learning_rate_at(self, step: int) -> float:
        """Warm up, then fall to zero in a straight line."""
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * (1 - step / self.steps)


def build_decoder(recipe: Recipe) -> tuple[LlamaForCausalLM, ConversionReport]:
    """A Llama with random weights, ternary, with SubLN where the paper puts it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(recipe.model_config())
    return model, convert_to_bitnet(model, ConversionConfig(subln="output"))


def train(model: LlamaForCausalLM, recipe: Recipe, *, on_step: Callable[[int, float], None]) -> list[float]:
    """Train on questions 0, 1, 2, …; the loss of every step."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    losses = []
    model.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(step)
        loss = answer_loss(model, sorting_batch(recipe.seed, step * recipe.batch_size, recipe.batch_size))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        on_step(step + 1, losses[-1])
    model.eval()
    return losses


def answer_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Mean cross-entropy of the answers; the head runs on their positions only."""
    hidden_BTH = model.model(input_ids=batch.input_ids[:, :-1], use_cache=False).last_hidden_state
    targets_BT = batch.labels[:, 1:]
    wanted_BT = targets_BT != IGNORED_LABEL
    return F.cross_entropy(model.lm_head(hidden_BTH[wanted_BT]), targets_BT[wanted_BT])
