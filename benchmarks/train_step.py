"""What does the trainer add to a training step?

    uv run python benchmarks/train_step.py                    SmolLM2-135M's shape, 4 × 256 tokens
    uv run python benchmarks/train_step.py --shape tiny       tiny_llama, 4 × 64 tokens
    uv run python benchmarks/train_step.py --check-only       both loops learn the same, no timing

Three ways to train the same ternary decoder, random weights, on the same batches with AdamW in fp32, one
thread: `run`, which is `wrinklefree train` with data, callbacks, metrics and Lightning; a bare loop of torch
over the same converted model; and transformers' `Trainer` with its AutoBitLinear, where accelerate is
installed. They take turns step by step, in CPU time. Saving is not in it: see benchmarks/saving.py.
"""

import argparse
import copy
import importlib.util
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
from shapes import SMOLLM2
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from data_handler import Batch
from wrinklefree.config import load_config
from wrinklefree.lightning.module import WrinkleFreeLightningModule
from wrinklefree.lightning.trainer import lightning_trainer
from wrinklefree.pretrained import load_pretrained
from wrinklefree.run import run
from wrinklefree.runs import read_metrics

LEARNING_RATE = 1e-4


class Trainer:
    """transformers' Trainer in a thread of its own, which takes a step when it is told to."""

    def __init__(self, shape: str, steps: int, directory: Path) -> None:
        self.seconds: list[float] = []
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._arguments = shape, steps, directory
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def step(self) -> None:
        """One step, while this thread waits."""
        self._go.release()
        while not self._done.acquire(timeout=1):
            assert self._thread.is_alive(), "the Trainer ended"

    def _train(self) -> None:
        import transformers

        torch.set_num_threads(1)

        turns = self

        class Clock(transformers.TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                turns._go.acquire()
                self.mark = time.process_time()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                turns.seconds.append(time.process_time() - self.mark)
                turns._done.release()

        shape, steps, directory = self._arguments
        stock_trainer(shape, steps, directory, Clock()).train()


class BareLoop(pl.Callback):
    """Does after each step of the trainer the same step of its own, and times both."""

    def __init__(self, trainer: Trainer | None) -> None:
        self.trainer = trainer
        self.ours: list[float] = []
        self.bare: list[float] = []
        self.losses: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, WrinkleFreeLightningModule)
        self.model: nn.Module = copy.deepcopy(pl_module.model)
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=LEARNING_RATE,
            weight_decay=0,
            fused=True,
        )
        self._mark = time.process_time()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: Any,
        batch_idx: int,
    ) -> None:
        now = time.process_time()
        self.ours.append(now - self._mark)
        self.losses.append(sum(float(self._step(micro_batch)) for micro_batch in batch))
        self.bare.append(time.process_time() - now)
        if self.trainer is not None:
            self.trainer.step()
        self._mark = time.process_time()

    def _step(self, batch: Batch) -> Tensor:
        loss: Tensor = self.model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, labels=batch.labels, use_cache=False
        ).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def train_all(
    shape: str, steps: int, directory: Path, trainer: Trainer | None = None
) -> tuple[BareLoop, list[float]]:
    """The loop that watched, and the losses of our trainer."""
    model = ["model=tiny_llama"]
    if shape == "smollm2":
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SMOLLM2)).save_pretrained(directory / "model")
        model = [
            "model.name=smollm2_shape",
            f"model.pretrained_name={directory / 'model'}",
            "model.tokenizer=demo",
        ]
    length = 256 if shape == "smollm2" else 64
    config = load_config(
        [
            *model,
            "training=stage2_pretrain",
            "data=demo",
            f"output_dir={directory}",
            "experiment_name=benchmark",
            f"training.max_steps={steps}",
            f"training.max_seq_length={length}",
            "training.batch_size=4",
            "training.gradient_accumulation_steps=1",
            "training.optimizer.type=adamw",
            f"training.optimizer.lr={LEARNING_RATE}",
            "training.optimizer.weight_decay=0",
            "training.scheduler.type=constant",
            "training.scheduler.warmup_steps=0",
            "training.lambda_warmup.enabled=false",
            "training.subln_warmup.enabled=false",
            "training.validation.num_batches=0",
            f"training.checkpoint.save_interval={steps + 1}",
            "training.checkpoint.save_at_end=false",
        ]
    )
    bare = BareLoop(trainer)

    def with_bare_loop(config: Any, callbacks: list[pl.Callback], ranks: Any, **named: Any) -> pl.Trainer:
        return lightning_trainer(config, [*callbacks, bare], ranks, **named)

    with mock.patch("wrinklefree.run.lightning_trainer", with_bare_loop):
        result = run(config)
    return bare, [row["loss"] for row in read_metrics(result.directory / "metrics.jsonl")]


def stock_trainer(shape: str, steps: int, directory: Path, clock: Any) -> Any:
    """transformers' Trainer with its own ternary layers."""
    from transformers import Trainer, TrainingArguments
    from transformers.integrations.bitnet import AutoBitLinear

    model: Any = LlamaForCausalLM(LlamaConfig(**SMOLLM2)) if shape == "smollm2" else None
    if model is None:
        model = load_pretrained("tiny_llama").model
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith("_proj"):
            layer = AutoBitLinear(module.in_features, module.out_features, bias=False, online_quant=True)
            layer.weight = module.weight
            model.set_submodule(name, layer)
    tokens = torch.randint(0, 500, (4 * steps, 256 if shape == "smollm2" else 64))
    arguments = TrainingArguments(
        output_dir=str(directory / "trainer"),
        per_device_train_batch_size=4,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in tokens]
    return Trainer(model=model, args=arguments, train_dataset=data, callbacks=[clock])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check-only", action="store_true", help="equal losses on the tiny model, no timing")
    parser.add_argument("--shape", choices=["smollm2", "tiny"], default="smollm2")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--allowed", type=float, help="share of overhead beyond which this fails")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = "tiny" if options.check_only else options.shape
    with tempfile.TemporaryDirectory() as name:
        with_trainer = importlib.util.find_spec("accelerate") is not None and not options.check_only
        trainer = Trainer(shape, options.steps, Path(name)) if with_trainer else None
        bare, losses = train_all(shape, 3 if options.check_only else options.steps, Path(name), trainer)
        # Each rounding that falls the other way draws the two further apart, so only the first steps tell.
        apart = max(abs(a - b) / b for a, b in zip(losses[:3], bare.losses[:3], strict=True))
        print(f"losses of trainer and bare loop differ by at most {apart:.1e}, relative, in three steps")
        if apart > 1e-3:
            print("error: they do not train the same model", file=sys.stderr)
            return 1
        if options.check_only:
            return 0
        ours, theirs = (statistics.median(each[1:]) for each in (bare.ours, bare.bare))
        overhead = statistics.median(a / b for a, b in zip(bare.ours[1:], bare.bare[1:], strict=True)) - 1
        print("| loop | ms of a step | beyond the bare loop |\n|---|---|---|")
        print(f"| bare torch | {1e3 * theirs:.1f} | |")
        print(f"| wrinklefree train | {1e3 * ours:.1f} | {overhead:+.1%} |", flush=True)
        if trainer is None:
            print("transformers' Trainer is left out: accelerate is not installed")
        else:
            stock = statistics.median(trainer.seconds[1:])
            ratio = statistics.median(a / b for a, b in zip(trainer.seconds[1:], bare.ours[1:], strict=True))
            print(f"| transformers' Trainer, AutoBitLinear | {1e3 * stock:.1f} | {stock / theirs - 1:+.1%} |")
            print(f"wrinklefree train is {ratio:.2f} × as fast as transformers' Trainer")
    return 1 if options.allowed is not None and overhead > options.allowed else 0


if __name__ == "__main__":
    sys.exit(main())
