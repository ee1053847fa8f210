"""What a decoder has read, and two ways on: read more, or look at a block that may still change.

    read   tokens → tokens        causal; kept
    look   block → prefix         everything; block → block: both directions; not kept

The second is what training lets the masked part of a batch see: all clean blocks strictly before its own,
and its own block in both directions (`objectives.views`). Layers with a sliding window see less of either.

Shapes: Q queries, K keys, L tokens of a block, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bitnet_arch.walk import config_of
from data_handler.masks import added_mask, by_layer_type


class Prefix:
    """Tokens that a model has read, with their keys and values unless `cached` is false."""

    def __init__(self, model: PreTrainedModel, *, cached: bool = True) -> None:
        self.model = model
        self.cached = cached
        self.num_forwards = 0
        self.tokens: list[int] = []
        self._cache = DynamicCache()

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, tokens: Sequence[int]) -> Tensor:
        """[V]: logits of what comes after these tokens, which become part of the prefix."""
        assert tokens, "nothing to read"
        logits = self._forward(tokens, keep=True, logits_to_keep=1)
        return logits[-1]

    def look(self, block: Sequence[int]) -> Tensor:
        """[L, V]: logits at tokens that see the prefix and one another. The prefix stays what it is."""
        mask = block_mask(
            self.model, len(self), len(block), num_queries=len(block) + (0 if self.cached else len(self))
        )
        return self._forward(block, keep=False, logits_to_keep=len(block), attention_mask=mask)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if self.cached:
            self._cache.crop(min(0, length - len(self)))
        del self.tokens[length:]

    @torch.no_grad()
    def _forward(self, tokens: Sequence[int], *, keep: bool, **inputs: Any) -> Tensor:
        given = list(tokens) if self.cached else [*self.tokens, *tokens]
        cache = {"past_key_values": self._cache, "use_cache": True} if self.cached else {"use_cache": False}
        try:
            output = self.model(input_ids=torch.tensor([given], device=self.model.device), **cache, **inputs)
            self.num_forwards += 1
            self.tokens.extend(tokens)
            if not keep:
                self.rewind(len(self) - len(tokens))
        except BaseException:
            # Ctrl-C may come between two layers: some would know the tokens, others not.
            self.tokens, self._cache = [], DynamicCache()
            raise
        logits: Tensor = output.logits[0]
        return logits


def block_mask(model: PreTrainedModel, num_before: int, block_size: int, *, num_queries: int) -> Any:
    """Causal, but for the block at the end, which sees itself in both directions: as `model` takes a mask.

    Its rows are the last `num_queries` tokens.
    """
    config = config_of(model)
    place_K = torch.arange(num_before + block_size, device=model.device)
    query_Q1, key_1K = place_K[-num_queries:, None], place_K[None]

    def mask(window: int | None) -> Tensor:
        allowed_QK = (key_1K <= query_Q1) | ((key_1K >= num_before) & (query_Q1 >= num_before))
        if window is not None:
            allowed_QK = allowed_QK & ((query_Q1 - key_1K).abs() < window)
        is_added = str(config._attn_implementation) == "eager"
        return added_mask(allowed_QK[None, None], model.dtype) if is_added else allowed_QK[None, None]

    return by_layer_type(config, mask)
