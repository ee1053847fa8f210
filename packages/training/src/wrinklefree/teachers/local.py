"""A teacher that runs here: never trained, always in evaluation mode, freed when nobody asks any more."""

import torch
from torch import nn

from data_handler import Batch
from wrinklefree.objectives.base import Needs
from wrinklefree.objectives.states import DecoderStates, decoder_states
from wrinklefree.teachers.base import Teacher


class LocalTeacher(Teacher):
    """Wraps a model; it may have another size than the student, and computes in the dtype of its weights."""

    knows_inside = True

    def __init__(self, model: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        """With `dtype` the weights are cast: bf16 halves their memory and changes the logits a little."""
        model.train(False)
        model.requires_grad_(False)
        self._model: nn.Module | None = model if dtype is None else model.to(dtype)

    @property
    def model(self) -> nn.Module:
        assert self._model is not None, "the teacher was closed"
        return self._model

    def answer(self, batch: Batch, needs: Needs, *, excluded: int | None) -> DecoderStates:
        # Not in inference mode: autograd may not save what comes from there.
        with torch.no_grad(), torch.autocast(batch.input_ids.device.type, enabled=False):
            return decoder_states(
                self.model,
                batch,
                hidden_states=needs.hidden_states,
                relations=needs.relations,
                excluded=excluded,
            )

    def to(self, device: torch.device | str) -> None:
        self.model.to(device)

    def close(self) -> None:
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
