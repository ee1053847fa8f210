"""Open what a person names: a checkpoint, the newest of a run, or any decoder that transformers loads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitnet_arch import load_bitnet
from durable import UserError
from wrinklefree.generation.generate import ends_of
from wrinklefree.pretrained import load_pretrained, tokenizer_beside
from wrinklefree.training.fetching import padded_step
from wrinklefree.training.run_directory import find_checkpoint

Message = dict[str, str]
"""`role` and `content`, as chat templates take them."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model that writes, and what turns text into its tokens and back."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with what the tokenizer puts in front of every text."""
        return list(self.tokenizer(text)["input_ids"])

    @property
    def ends(self) -> set[int]:
        """Tokens that end a text: the tokenizer's, and those of the model's that are no ordinary text."""
        # A fresh configuration of transformers brings ids that mean something else to another tokenizer.
        ends = {token for token in ends_of(self.model) if self._is_special(token)}
        own = self.tokenizer.eos_token_id
        return ends if own is None else {*ends, int(own)}

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """A conversation up to where the next answer begins. UserError without a chat template."""
        text = self._templated(messages, add_generation_prompt=True)
        # The template writes what stands in front of a text itself.
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def chat_ends(self) -> set[int]:
        """Tokens that end an answer: those that end a text, and what the template puts behind an answer."""
        answer = "wrinklefree"
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        behind = self._templated(messages).rpartition(answer)[2].lstrip()
        tokens = self.tokenizer(behind, add_special_tokens=False)["input_ids"]
        return {*self.ends, *(token for token in tokens[:1] if self._is_special(token))}

    def _is_special(self, token: int) -> bool:
        added = self.tokenizer.added_tokens_decoder.get(token)
        return token != self.tokenizer.mask_token_id and added is not None and bool(added.special)

    def _templated(self, messages: Sequence[Message], **options: Any) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{self.source}: its tokenizer has no chat template", fix="use 'wrinklefree generate'"
            )
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        return str(text)


def open_decoder(name: str) -> Decoder:
    """A checkpoint, a directory with several of which the newest counts, or whatever `load_pretrained` takes.

    On the first GPU where there is one. A checkpoint has the λ and μ that it was saved with.
    """
    checkpoint = _checkpoint(name)
    if checkpoint is None:
        pretrained = load_pretrained(name)
        model, tokenizer, source = pretrained.model, pretrained.tokenizer, pretrained.source
    else:
        model, tokenizer, source = load_bitnet(checkpoint), tokenizer_beside(checkpoint, name), name
    if tokenizer is None:
        raise UserError(f"{source}: has no tokenizer", fix="name a checkpoint that was saved with one")
    if torch.cuda.is_available():
        torch.nn.Module.cuda(model)
    return Decoder(model.eval(), tokenizer, source)


def _checkpoint(name: str) -> Path | None:
    """Where it lies, if the name is not one for `load_pretrained`."""
    path = Path(name).expanduser()
    if "://" not in name and path.name and not path.is_dir():
        path = path.with_name(padded_step(path.name))
        if not path.is_dir():
            return None
    is_plain = (path / "config.json").is_file() and not (path / "bitnet.json").is_file()
    return None if is_plain else find_checkpoint(name, key=name)
