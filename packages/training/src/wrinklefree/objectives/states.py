"""One forward of a decoder without its head, and what objectives see of it.

The head is left to them: full-vocabulary logits of all tokens are the largest tensor of a training step, and
`vocabulary.py` computes losses without ever holding them. Documents of a packed sample do not see each other.

Shapes: B samples, T tokens, D hidden size, V vocabulary.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionMaskInterface

from bitnet_arch import ModelWalk, walk
from bitnet_arch.walk import config_of
from data_handler import Batch
from data_handler.masks import attention_mask
from durable import UserError
from wrinklefree.objectives.head import Head

NEEDS_OTHER_MASKS = ("flash", "flex", "paged")
"""How the names of implementations begin that take no dense mask."""
_WALKS: WeakKeyDictionary[nn.Module, ModelWalk] = WeakKeyDictionary()
"""Looking takes milliseconds, which a small step would feel."""


@dataclass(frozen=True, slots=True)
class DecoderStates:
    """What a forward left behind."""

    hidden: Tensor
    """[B, T, D], after the final norm."""
    head: Head

    @classmethod
    def from_logits(cls, logits_BTV: Tensor) -> "DecoderStates":
        """For who holds logits already: a head that changes nothing."""
        return cls(logits_BTV, Head(nn.Identity()))

    @property
    def vocab_size(self) -> int:
        """How many logits a token has."""
        return int(getattr(self.head.module, "out_features", self.hidden.shape[-1]))

    @property
    def logits(self) -> Tensor:
        """[B, T, V] of all tokens at once. Losses over the vocabulary do without."""
        return self.head(self.hidden)


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """What objectives are computed from: a forward of the student, and of the teacher where one is needed."""

    student: DecoderStates
    teacher: DecoderStates | None = None


def decoder_states(model: nn.Module, batch: Batch) -> DecoderStates:
    """Run the body of a decoder on a batch."""
    walked = _walked(model)
    output = model.get_submodule(walked.final_norm.rpartition(".")[0])(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=packed_mask(model, batch.document_ids),
        use_cache=False,
    )
    softcap = getattr(config_of(model), "final_logit_softcapping", None)
    return DecoderStates(output.last_hidden_state, Head(model.get_submodule(walked.head), softcap))


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
