"""One forward of a decoder without its head, and what objectives see of it.

The head is left to them: full-vocabulary logits of all tokens are the largest tensor of a training step, and
`vocabulary.py` computes losses without ever holding them. Documents of a packed sample do not see each other.

Shapes: B samples, T tokens, P parts (the clean tokens and their masked views), D hidden size, V vocabulary.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface

from bitnet_arch import ModelWalk, block_diffusion_of, walk
from bitnet_arch.walk import config_of
from data_handler import Batch
from data_handler.masks import attention_mask
from durable import UserError
from wrinklefree.attention import AttentionInput, Observer, by_parts, observed
from wrinklefree.objectives.head import Head, open_head
from wrinklefree.objectives.views import MaskedViews, ViewPlan, view_attention_mask

if TYPE_CHECKING:
    from wrinklefree.teachers.base import NextTokens, TeacherStates

NEEDS_OTHER_MASKS = ("flash", "flex", "paged")
"""How the names of implementations begin that take no dense mask."""
_WALKS: WeakKeyDictionary[nn.Module, ModelWalk] = WeakKeyDictionary()
"""Looking takes milliseconds, which a small step would feel."""


@dataclass(frozen=True, slots=True)
class DecoderStates:
    """What a forward left behind."""

    hidden: Tensor
    """[B, P · T, D], after the final norm: the clean tokens, then those of each masked view."""
    head: Head
    num_parts: int = 1
    layers: tuple[Tensor, ...] = ()
    """[B, T, D] each: what every decoder layer gives to the next, of the clean tokens."""
    relations: Mapping[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    """Layer → queries, keys and values of the clean tokens, [B, heads, T, size of a head]."""

    @classmethod
    def from_logits(cls, logits_BTV: Tensor) -> "DecoderStates":
        """For who holds logits already: a head that changes nothing."""
        return cls(logits_BTV, Head(nn.Identity()))

    @property
    def num_tokens(self) -> int:
        """T, of one part."""
        return self.hidden.shape[1] // self.num_parts

    @property
    def vocab_size(self) -> int:
        """How many logits a token has."""
        size = self.head.vocab_size
        return self.hidden.shape[-1] if size is None else size

    @property
    def logits(self) -> Tensor:
        """[B, P · T, V] of all tokens at once. Losses over the vocabulary do without."""
        return self.head(self.hidden)

    def next_tokens(self, before_N: Tensor) -> "NextTokens":
        """As a teacher: logits of the token that follows each of these."""
        hidden_ND = self.rows(before_N)
        with torch.autocast(hidden_ND.device.type, enabled=False):  # in the teacher's own dtype
            products = open_head(self.head, hidden_ND, learns=False)
        return lambda tokens: products.logits(hidden_ND[tokens])

    def rows(self, places_N: Tensor, part: int = 0) -> Tensor:
        """[N, D]: hidden states of these of the B · T tokens, in this part."""
        length = self.num_tokens
        flat_N = places_N + (places_N // length * (self.num_parts - 1) + part) * length
        return self.hidden.flatten(0, 1).index_select(0, flat_N)


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """What objectives are computed from: a forward of the student, and of the teacher where one is needed."""

    student: DecoderStates
    teacher: "TeacherStates | None" = None
    views: MaskedViews | None = None
    """What the student's masked parts are."""


def decoder_states(
    model: nn.Module,
    batch: Batch,
    *,
    views: MaskedViews | None = None,
    plan: ViewPlan | None = None,
    hidden_states: bool = False,
    relations: Collection[int] = (),
    excluded: int | None = None,
) -> DecoderStates:
    """Run the body of a decoder on a batch, and on masked views of it in the same forward.

    `excluded` is the token that is not to be predicted; by default the model's own [MASK].
    """
    walked = _walked(model)
    body = model.get_submodule(walked.final_norm.rpartition(".")[0])
    config = config_of(model)
    diffusion = block_diffusion_of(model)
    num_samples, length = batch.input_ids.shape
    taken = _Taken(length)
    with ExitStack() as looking:
        if hidden_states:
            looking.enter_context(taken.hidden_states(model, walked))
        if relations:
            looking.enter_context(taken.relations(model, walked, relations))
        if views is None:
            output = body(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=packed_mask(model, batch.document_ids),
                use_cache=False,
            )
        else:
            assert plan is not None
            assert diffusion is not None, "who asks for views has a [MASK]"
            inputs = _inputs_of_views(model, batch, views, plan, diffusion.mask_token_id)
            if not plan.causal and str(config._attn_implementation).startswith("sdpa"):
                looking.enter_context(by_parts(config))
            output = body(**inputs)
    if excluded is None and diffusion is not None:
        excluded = diffusion.mask_token_id
    head = model.get_submodule(walked.head)
    rows = getattr(head, "out_features", None)
    if excluded is not None and rows is not None and excluded >= rows:
        excluded = None  # a teacher without the student's row for [MASK]
    num_parts = 1 if views is None else 1 + len(views)
    hidden = output.last_hidden_state
    if hidden.shape[0] != num_samples:  # parts came as samples of their own
        hidden = torch.cat(hidden.chunk(num_parts), dim=1)
    softcap = getattr(config, "final_logit_softcapping", None)
    return DecoderStates(
        hidden,
        Head(head, softcap, excluded),
        num_parts=num_parts,
        layers=tuple(layer[:num_samples, :length] for layer in taken.layers),
        relations={
            layer: tuple(each[:num_samples, :, :length] for each in qkv)  # type: ignore[misc]
            for layer, qkv in taken.by_layer.items()
        },
    )


def _inputs_of_views(
    model: nn.Module, batch: Batch, views: MaskedViews, plan: ViewPlan, mask_token_id: int
) -> dict[str, Any]:
    """Clean tokens and views, beside each other in one sample, or as samples of their own."""
    tokens = views.tokens(batch.input_ids, mask_token_id)
    num_parts, config = 1 + len(views), config_of(model)
    if plan.causal:
        document_ids = batch.document_ids.repeat(num_parts, 1)
        return {
            "input_ids": torch.cat(tokens.chunk(num_parts, dim=1)),
            "position_ids": batch.position_ids.repeat(num_parts, 1),
            "attention_mask": packed_mask(model, document_ids),
            "use_cache": False,
        }
    implementation = str(config._attn_implementation)
    if implementation.startswith(NEEDS_OTHER_MASKS) and not implementation.startswith("flex"):
        raise UserError(
            "training.diffusion.attention: this implementation takes no mask of blocks",
            found=implementation,
            fix="load the model with sdpa, or set training.diffusion.attention=causal",
        )
    return {
        "input_ids": tokens,
        "position_ids": batch.position_ids.repeat(1, num_parts),
        "attention_mask": view_attention_mask(
            config,
            batch,
            block_size=plan.block_size,
            num_views=len(views),
            dtype=next(model.parameters()).dtype,
        ),
        "use_cache": False,
    }


@dataclass(slots=True)
class _Taken:
    """What hooks took from inside a forward."""

    length: int
    layers: list[Tensor] = field(default_factory=list)
    by_layer: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @contextmanager
    def hidden_states(self, model: nn.Module, walked: ModelWalk) -> Iterator[None]:
        def take(module: nn.Module, inputs: Any, output: Any) -> None:
            self.layers.append(output[0] if isinstance(output, tuple) else output)

        hooks = [model.get_submodule(layer.path).register_forward_hook(take) for layer in walked.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def relations(self, model: nn.Module, walked: ModelWalk, wanted: Collection[int]) -> Iterator[None]:
        numbers: dict[int, list[int]] = {}
        for number in wanted:
            numbers.setdefault(layer_index(number, len(walked.layers)), []).append(number)

        def taker(layer: int) -> Observer:
            def take(seen: AttentionInput) -> None:
                # Masked views come after the clean part.
                for number in numbers[layer]:
                    self.by_layer.setdefault(number, (seen.query, seen.key, seen.value))

            return take

        observers = {}
        for layer in numbers:
            path = walked.layers[layer].projections["q_proj"]
            observers[model.get_submodule(path.rpartition(".")[0])] = taker(layer)
        with observed(config_of(model), observers, wanted_by="objectives.attention_distill"):
            yield


def layer_index(number: int, num_layers: int, *, key: str = "distill_layer") -> int:
    """From 0; negative numbers count from the end."""
    if not -num_layers <= number < num_layers:
        raise UserError(
            f"{key}: there is no such layer",
            f"{number}, the model has {num_layers}",
            f"give {-num_layers} to {num_layers - 1}",
        )
    return number % num_layers


def _walked(model: nn.Module) -> ModelWalk:
    if model not in _WALKS:
        _WALKS[model] = walk(model)
    return _WALKS[model]


def packed_mask(model: nn.Module, document_ids: Tensor) -> Tensor | dict[str, Tensor] | None:
    """The mask that keeps documents apart; none where every sample is one document, as causal attention
    without a mask is faster.
    """
    config = config_of(model)
    implementation = str(config._attn_implementation)
    # For a name that it has no masks for, transformers would leave a sliding window out, too.
    makes_causal_masks = implementation in AttentionMaskInterface()
    if makes_causal_masks and bool((document_ids == document_ids[:, :1]).all()):
        return None
    if implementation.startswith(NEEDS_OTHER_MASKS):
        raise UserError(
            "attention: this implementation does not keep packed documents apart",
            found=implementation,
            fix="set sdpa",
        )
    return attention_mask(config, document_ids, dtype=next(model.parameters()).dtype)
