"""What the model writes while it learns: every prompt continued greedily and by a seeded draw.

Rows of `samples.jsonl`; of a step that was run again, the last row counts. The run's own random numbers,
weights and mode are afterwards what they were.
"""

from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from durable import UserError
from wrinklefree.config.schema import SamplesConfig
from wrinklefree.lightning.callbacks.ramps import RampCallback
from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.training.metrics import append_row
from wrinklefree.training.randomness import seed_for


class SamplesCallback(pl.Callback):
    """`path` is none on ranks that write nothing."""

    def __init__(
        self,
        config: SamplesConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        ramps: RampCallback,
        path: Path | None,
        *,
        seed: int,
        longest: int,
    ) -> None:
        self.config = config
        self.ramps = ramps
        self.path = path
        self.seed = seed
        self.tokenizer = tokenizer
        self.prompts = _encoded(config, tokenizer, longest)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, WrinkleFreeLightningModule)
        step, every = pl_module.progress.step, self.config.every
        if self.path is None or every is None or (step % every and step != pl_module.max_steps):
            return
        model = pl_module.model
        assert isinstance(model, PreTrainedModel)
        was_training = model.training
        model.eval()
        try:
            self._write(self.path, model, step)
        finally:
            model.train(was_training)

    def _write(self, path: Path, model: PreTrainedModel, step: int) -> None:
        amounts = {"lambda": self.ramps.amounts["lambda"], "mu": self.ramps.amounts["mu"]}
        for number, (prompt, tokens) in enumerate(zip(self.config.prompts, self.prompts, strict=True)):
            for temperature in (0.0, self.config.temperature):
                seed = seed_for(self.seed, "sample", step, number)
                written = continued(
                    model, tokens, self.config.max_new_tokens, temperature=temperature, seed=seed
                )
                assert self.tokenizer is not None
                text = self.tokenizer.decode(written)
                row = {"step": step, **amounts, "prompt": prompt, "temperature": temperature, "text": text}
                append_row(path, "sample", row)


@torch.no_grad()
def continued(
    model: PreTrainedModel, tokens: list[int], num_new: int, *, temperature: float, seed: int
) -> list[int]:
    """The tokens that the model writes after these, the likeliest ones at temperature 0.

    Draws come from a generator of their own, so nobody else's random numbers move on.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([tokens], device=model.device)
    cache, written = None, []
    for _ in range(num_new):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token = _next(output.logits[0, -1].float().cpu(), temperature, generator)
        written.append(token)
        ids = torch.tensor([[token]], device=model.device)
    return written


def _next(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0 or not logits.isfinite().all():
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))


def _encoded(
    config: SamplesConfig, tokenizer: PreTrainedTokenizerBase | None, longest: int
) -> list[list[int]]:
    if tokenizer is None:
        raise UserError(
            "training.samples: this model brings no tokenizer", fix="name one with model.tokenizer"
        )
    found = []
    for prompt in config.prompts:
        tokens: list[int] = tokenizer(prompt)["input_ids"]
        if not tokens or len(tokens) + config.max_new_tokens > longest:
            raise UserError(
                "training.samples.prompts: a prompt and its continuation do not fit the model",
                f"{prompt!r}, {len(tokens)} + {config.max_new_tokens} tokens of {longest}",
                "give at least one token, or lower training.samples.max_new_tokens",
            )
        found.append(tokens)
    return found
