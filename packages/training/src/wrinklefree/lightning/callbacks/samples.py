"""What the model writes while it learns: every prompt continued greedily and by a seeded draw.

Rows of `samples.jsonl`; of a step that was run again, the last row counts. The run's own random numbers,
weights and mode are afterwards what they were.
"""

from pathlib import Path

import pytorch_lightning as pl
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from durable import UserError
from wrinklefree.config.schema import SamplesConfig
from wrinklefree.generation import Decoding, generate_ids
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
                decoding = Decoding(
                    max_new_tokens=self.config.max_new_tokens, temperature=temperature, seed=seed
                )
                assert self.tokenizer is not None
                text = self.tokenizer.decode(generate_ids(model, tokens, decoding, ends=()).tokens)
                row = {"step": step, **amounts, "prompt": prompt, "temperature": temperature, "text": text}
                append_row(path, "sample", row)


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
