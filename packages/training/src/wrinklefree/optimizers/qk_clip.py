"""QK-clip (MuonClip, arXiv 2507.20534): attention logits that grow too large are scaled back in W_q and W_k.

After a step, S_h is the largest q·k·scale that head h saw in the forward pass of that step. The paper scales
each head by itself. A ternary matrix has one scale for all its heads, and rows made smaller than the rest
would fall into its dead zone, so here a layer has one factor, that of its largest head:
f = threshold / max S, W_q ← f^α W_q, W_k ← f^(1-α) W_k, and the same for their biases. Codes stay as they
are, scales shrink, and so the logits shrink by f through the quantiser as well.

Where queries and keys pass a norm of their own (Qwen3, Gemma 3) no factor on W_q or W_k could change a logit,
and nothing is done.

Shapes: B samples, H heads, G heads per key head, T queries, S keys, D head size; layers are L.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitnet_arch import walk
from bitnet_arch.walk import config_of, linear_at
from durable import UserError
from wrinklefree.attention import AttentionInput, Observer, observed

logger = logging.getLogger(__name__)

MAX_ELEMENTS = 2**20
"""Logits that are alive at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QKClipStats:
    """What one step did."""

    max_logit: float
    """Largest of all layers, before clipping."""
    num_clipped: int
    """Layers whose W_q and W_k were scaled."""
    factor: float
    """The smallest; 1 where nothing was clipped."""


class QKClip:
    """Records the largest attention logits of a forward pass, and clips by them after the step."""

    def __init__(self, model: nn.Module, *, threshold: float, alpha: float = 0.5) -> None:
        self.threshold = threshold
        self.alpha = alpha
        self.config = config_of(model)
        walked = walk(model)
        self.attentions, self.queries, self.keys = [], [], []
        for layer in walked.layers:
            query, key = layer.projections["q_proj"], layer.projections["k_proj"]
            self.attentions.append(model.get_submodule(query.rpartition(".")[0]))
            self.queries.append(linear_at(model, query))
            self.keys.append(linear_at(model, key))
        self.num_heads = walked.num_heads
        self.max_logits_LH: Tensor | None = None
        """Of the last forward pass that was recorded."""
        self.why_inactive = self._why_inactive(has_norms=any(layer.query_norm for layer in walked.layers))
        if self.why_inactive is not None:
            logger.info("QK-clip does nothing here: %s", self.why_inactive)
        elif self.config._attn_implementation != "sdpa":  # it reads a dense mask, too
            raise UserError(
                "training.optimizer.enable_clipping: QK-clip reads logits beside SDPA",
                f"attention {self.config._attn_implementation!r}",
                "load the model with attn_implementation='sdpa', or set enable_clipping=false",
            )

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record during the forward passes inside; outputs stay as they are, to the bit."""
        if self.why_inactive is not None:
            yield
            return
        largest = torch.full(
            (len(self.attentions), self.num_heads), -torch.inf, device=self.queries[0].weight.device
        )
        observers = {
            attention: _recorder(largest_H)
            for attention, largest_H in zip(self.attentions, largest, strict=True)
        }
        with observed(self.config, observers, wanted_by="training.optimizer.enable_clipping"):
            yield
        self.max_logits_LH = largest

    @torch.no_grad()
    def clip(self) -> QKClipStats | None:
        """Scale W_q and W_k of layers whose logits went beyond the threshold; none if nothing was recorded.

        Every rank calls this: all take the largest logit of any.
        """
        largest, self.max_logits_LH = self.max_logits_LH, None
        if largest is None:
            return None
        if dist.is_initialized():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        per_layer: list[float] = largest.amax(dim=1).tolist()
        num_clipped, smallest = 0, 1.0
        for logit, query, key in zip(per_layer, self.queries, self.keys, strict=True):
            # Infinite and NaN logits are the business of whoever skips the step.
            if self.threshold < logit < torch.inf:
                factor = self.threshold / logit
                smallest = min(smallest, factor)
                _scale(query, factor**self.alpha)
                _scale(key, factor ** (1 - self.alpha))
                num_clipped += 1
        return QKClipStats(max_logit=max(per_layer), num_clipped=num_clipped, factor=smallest)

    def _why_inactive(self, *, has_norms: bool) -> str | None:
        if has_norms:
            return "queries and keys have norms of their own, which undo any scale"
        if not all(layer.weight.requires_grad for layer in (*self.queries, *self.keys)):
            return "W_q and W_k are frozen"
        return None


def largest_logits(
    query: Tensor, key: Tensor, mask: Tensor | None, *, scale: float, is_causal: bool
) -> Tensor:
    """[H]: the largest q·k·scale of each head over all pairs that may look at each other, in fp32.

    query [B, H, T, D], key [B, H / G, S, D], mask [B or 1, 1, T, S], boolean or added to logits.
    """
    num_samples, num_heads, length, _ = query.shape
    num_key_heads, num_keys = key.shape[1], key.shape[2]
    keys = key.float().transpose(-1, -2)
    rows = max(1, MAX_ELEMENTS // (num_samples * num_heads * num_keys))
    largest = torch.full((num_key_heads, num_heads // num_key_heads), -torch.inf, device=query.device)
    for start in range(0, length, rows):
        some = query[:, :, start : start + rows].float()
        end = start + some.shape[2]
        num_seen = end if is_causal else num_keys
        # Heads that share a key head become more rows of its product.
        rows_BKRD = some.reshape(num_samples, num_key_heads, -1, some.shape[-1])
        logits = (rows_BKRD @ keys[..., :num_seen]).unflatten(2, (-1, end - start))
        seen = _seen(mask, start, end, num_seen, is_causal, query.device)
        if seen is not None:
            logits.masked_fill_(~seen, -torch.inf)
        torch.maximum(largest, logits.amax(dim=(0, 3, 4)), out=largest)
    return largest.flatten() * scale


def _seen(
    mask: Tensor | None, start: int, end: int, num_seen: int, is_causal: bool, device: torch.device
) -> Tensor | None:
    """Which of these queries may look at which keys, to be broadcast to [B, H / G, G, rows, keys]."""
    if mask is not None:
        some = mask[..., start:end, :num_seen].unsqueeze(1)
        return some if some.dtype == torch.bool else some == 0
    if not is_causal:
        return None
    return torch.arange(start, end, device=device)[:, None] >= torch.arange(num_seen, device=device)


def _scale(linear: nn.Linear, factor: float) -> None:
    linear.weight.mul_(factor)
    if linear.bias is not None:
        linear.bias.mul_(factor)


def _recorder(largest_H: Tensor) -> Observer:
    """Keeps the largest logits in `largest_H`."""

    @torch.no_grad()
    def record(seen: AttentionInput) -> None:
        with torch.autocast(seen.query.device.type, enabled=False):
            found_H = largest_logits(
                seen.query, seen.key, seen.mask, scale=seen.scale, is_causal=seen.is_causal
            )
            torch.maximum(largest_H, found_H, out=largest_H)

    return record
