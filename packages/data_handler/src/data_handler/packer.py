"""Texts packed in memory: what `prepare` and the loader do, for a stream that is read once and never stored.

Texts become blocks by the same rules (`packing.py`): a separator ends every document, positions restart, each
document has its number, and its first token has no label. There is no attention mask of ones: tokens see each
other where `document_ids` are equal, which `data_handler.attention_mask` makes a mask of.

Shapes: T tokens.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from data_handler.encoder import TextEncoder, load_encoder
from data_handler.types import IGNORED_LABEL

Sample = dict[str, Tensor]
"""`input_ids`, `labels`, `position_ids` and `document_ids`, each [T] int64."""


class TokenPacker:
    """Takes texts one by one and gives blocks of `max_length` tokens when they are full."""

    def __init__(
        self,
        tokenizer: TextEncoder | str | Path = "demo",
        max_length: int = 2048,
        *,
        separator_token_id: int | None = None,
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be 1 or more, got {max_length}.")
        self.encoder = tokenizer if isinstance(tokenizer, TextEncoder) else load_encoder(tokenizer)
        self.max_length = max_length
        # An id of 0 is as good as any other.
        self.separator = self.encoder.eos_token_id if separator_token_id is None else separator_token_id
        self.reset()

    def reset(self) -> None:
        """Forget the tokens that have not filled a block."""
        self._tokens: NDArray[np.uint32] = np.empty(0, np.uint32)
        self._begins: NDArray[np.int64] = np.empty(0, np.int64)

    def add_text(self, text: str) -> list[Sample]:
        """The blocks that this text fills, none or several."""
        return self.add_texts([text])

    def add_texts(self, texts: list[str]) -> list[Sample]:
        """The blocks that these texts fill; encoded together, which is faster than one by one."""
        ended = [np.append(ids, np.uint32(self.separator)) for ids in self.encoder.encode(texts)]
        begins = len(self._tokens) + np.cumsum([0, *map(len, ended)])[:-1]
        self._begins = np.concatenate([self._begins, begins])
        self._tokens = np.concatenate([self._tokens, *ended])
        return [self._cut(self.max_length) for _ in range(len(self._tokens) // self.max_length)]

    def flush(self) -> Sample | None:
        """What is left, shorter than a block; None when there is nothing."""
        return self._cut(len(self._tokens)) if len(self._tokens) else None

    def get_remaining_tokens(self) -> int:
        """How many tokens wait for a block to be full."""
        return len(self._tokens)

    def _cut(self, length: int) -> Sample:
        """The first `length` tokens; a document that they cut goes on in the next block as a new one."""
        ids, within = self._tokens[:length].astype(np.int64), self._begins[self._begins < length]
        begins = np.union1d([0], within)
        document_ids = np.searchsorted(begins, np.arange(length), side="right") - 1
        labels = ids.copy()
        labels[begins] = IGNORED_LABEL
        self._tokens, self._begins = self._tokens[length:], self._begins[len(within) :] - length
        rows = {
            "input_ids": ids,
            "labels": labels,
            "position_ids": np.arange(length) - begins[document_ids],
            "document_ids": document_ids,
        }
        return {name: torch.from_numpy(row) for name, row in rows.items()}


class PackedDataset(IterableDataset[Sample]):
    """Full blocks of a stream of texts (or of tables with a `text`), such as `MixedDataset`.

    The tail that fills no block is left out.
    """

    def __init__(
        self,
        dataset: Iterable[str | Mapping[str, str]],
        tokenizer: TextEncoder | str | Path = "demo",
        max_length: int = 2048,
        *,
        separator_token_id: int | None = None,
        tokenize_batch_size: int = 256,
    ) -> None:
        if tokenize_batch_size < 1:
            raise ValueError(f"tokenize_batch_size must be 1 or more, got {tokenize_batch_size}.")
        self.dataset = dataset
        self.tokenize_batch_size = tokenize_batch_size
        self._packer = TokenPacker(tokenizer, max_length, separator_token_id=separator_token_id)

    def __iter__(self) -> Iterator[Sample]:
        self._packer.reset()
        texts: list[str] = []
        for item in self.dataset:
            texts.append(item if isinstance(item, str) else item["text"])
            if len(texts) == self.tokenize_batch_size:
                yield from self._packer.add_texts(texts)
                texts = []
        if texts:
            yield from self._packer.add_texts(texts)
