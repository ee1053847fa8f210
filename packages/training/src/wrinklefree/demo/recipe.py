"""The demo's task as files, and the run that learns it: ternary from the first step, no question twice.

random Llama, tokenizer of 12 characters ─┐
questions with answers, as chats ─────────┴─► the trainer, as `wrinklefree train` runs it ─► checkpoint
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data_handler.sorting import ANSWER_LENGTH, CHARACTERS, PROMPT_LENGTH, decode, sorting_batch
from wrinklefree.config import load_config
from wrinklefree.run import RunResult, run

END = "<end>"
"""Between documents; an answer ends with its newline."""
SAMPLE_LENGTH = PROMPT_LENGTH + ANSWER_LENGTH + len([END])
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{{ '>' if m['role'] == 'user' else '\n' }}{% endfor %}"
)


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
            vocab_size=len([*CHARACTERS, END]),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            tie_word_embeddings=True,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=len(CHARACTERS),
        )

    def overrides(self, directory: Path) -> list[str]:
        """What `wrinklefree train` is told."""
        return [
            "training=base",
            "experiment_name=demo",
            f"output_dir={directory}",
            f"seed={self.seed}",
            "model.name=sorter",
            f"model.pretrained_name={directory / 'dense'}",
            f"data.config_name={directory / 'data.yaml'}",
            f"data.directory={directory / 'data'}",
            f"training.max_seq_length={SAMPLE_LENGTH}",
            f"training.batch_size={self.batch_size}",
            "training.gradient_accumulation_steps=1",
            f"training.max_steps={self.steps}",
            "export.target=hf",  # its tokenizer has a word for each digit, which no engine splits text by
            "training.auto_convert.subln=output",
            "training.subln_warmup.enabled=false",
            "training.optimizer.type=adamw",
            f"training.optimizer.lr={self.learning_rate}",
            "training.optimizer.adam_betas=[0.9,0.98]",
            "training.optimizer.weight_decay=0",
            "training.scheduler.type=linear",
            f"training.scheduler.warmup_steps={min(self.warmup_steps, self.steps - 1)}",
            "training.validation.num_batches=0",
            f"training.logging.log_interval={max(1, self.steps // 8)}",
        ]


def write_task(recipe: Recipe, directory: Path) -> None:
    """A dense model with random weights, its tokenizer, and every question of the run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(recipe.model_config())
    model.bfloat16().save_pretrained(directory / "dense")
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate([*CHARACTERS, END])}))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, chat_template=CHAT_TEMPLATE
    ).save_pretrained(directory / "dense")
    samples = sorting_batch(recipe.seed, 0, recipe.steps * recipe.batch_size).input_ids
    with (directory / "questions.jsonl").open("w", encoding="utf-8") as file:
        for question, answer in (decode(row).rstrip("\n").split(">") for row in samples.tolist()):
            said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": said}) + "\n")
    source = {
        "format": "jsonl",
        "path": str(directory / "questions.jsonl"),
        "messages_field": "messages",
        "answers_only": True,
    }
    data = {"name": "sorting", "sources": {"questions": source}}
    (directory / "data.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")


def learn(recipe: Recipe, directory: Path) -> RunResult:
    """Train on the task of this directory."""
    return run(load_config(recipe.overrides(directory)))
