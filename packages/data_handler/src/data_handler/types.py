"""What every consumer of training data meets: one typed batch.

Shapes: B samples, T tokens.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

IGNORED_LABEL = -100
"""The label that asks for no loss, as in `torch.nn.functional.cross_entropy` and transformers."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed samples. Labels are unshifted, as transformers takes them."""

    input_ids: Tensor
    """[B, T] int64."""
    labels: Tensor
    """[B, T] int64: -100 on the first token of each document and wherever no loss is wanted."""
    position_ids: Tensor
    """[B, T] int64: from 0 in every document."""
    document_ids: Tensor
    """[B, T] int64: from 0 in every sample; tokens see each other only where these are equal."""
    source_id: Tensor
    """[B] int64: place of the sample's source in the mixture."""
    sample_id: Tensor
    """[B] int64: global index of the sample."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The same batch on another device."""
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=non_blocking)
            for field in fields(self)
        }
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, for copies to an accelerator that do not wait."""
        return replace(self, **{field.name: getattr(self, field.name).pin_memory() for field in fields(self)})

    def __len__(self) -> int:
        return self.input_ids.shape[0]
