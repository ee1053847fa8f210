"""The head in pieces: logits of a few tokens at a time, and their way back, with one buffer for its gradient.

A head turns the last hidden states into logits. It is a linear layer in every family; it may be ternary, have
hooks, or be followed by a soft cap. `open_head` gives its products over one chunk after another. A plain
linear layer adds up its weight's gradient in place; any other module is asked to differentiate itself.

Shapes: C tokens of a chunk, D hidden size, V vocabulary.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Head:
    """From last hidden states to logits."""

    module: nn.Module
    softcap: float | None = None
    """Logits are drawn into ± this by tanh, as Gemma can be set to."""
    excluded: int | None = None
    """[MASK], which nobody is to predict: cut off where it is the last token, −∞ elsewhere."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """[…, D] → […, V]."""
        logits: Tensor = self.module(hidden)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.excluded is None:
            return logits
        if self.excluded == logits.shape[-1] - 1:
            return logits[..., :-1]
        place = torch.tensor([self.excluded], device=logits.device)
        return logits.index_fill(-1, place, -torch.inf)

    @property
    def vocab_size(self) -> int | None:
        """How many logits a token has; None where the module does not say."""
        rows = getattr(self.module, "out_features", None)
        return None if rows is None else int(rows) - (self.excluded == rows - 1)

    def learning(self) -> tuple[nn.Parameter, ...]:
        """The parameters that a gradient is wanted for."""
        return tuple(parameter for parameter in self.module.parameters() if parameter.requires_grad)

    @property
    def is_plain(self) -> bool:
        """Is calling the module the same as `F.linear` with its weight?"""
        module = self.module
        has_hooks = bool(module._forward_hooks or module._forward_pre_hooks)
        return type(module) is nn.Linear and self.softcap is None and not has_hooks


class HeadProducts(ABC):
    """The products of a head over one chunk after another."""

    gradients: list[Tensor]
    """Of `Head.learning`, in its order: sums over the chunks that went back."""

    @abstractmethod
    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Of the next chunk, [C, V]."""

    @abstractmethod
    def back(self, gradient_CV: Tensor) -> Tensor:
        """The gradient of the chunk's hidden states from that of its logits; adds to `gradients`."""


def open_head(head: Head, hidden: Tensor, *, learns: bool) -> HeadProducts:
    """Begin with the products of a head for states like `hidden`; with `learns` they will go back, too."""
    return (
        LinearProducts(head, hidden, learns=learns) if head.is_plain else ModuleProducts(head, learns=learns)
    )


class LinearProducts(HeadProducts):
    """Of a plain linear layer: three GEMMs a chunk, the weight's gradient summed up in place."""

    def __init__(self, head: Head, hidden: Tensor, *, learns: bool) -> None:
        assert isinstance(head.module, nn.Linear)
        device = hidden.device.type
        weight, bias = head.module.weight, head.module.bias
        # What autocast would do, but once and not for every chunk.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        self._device, self._dtype = device, dtype
        self._num_rows, self._excluded = head.vocab_size, head.excluded
        self._weight = weight.detach()[: self._num_rows].to(dtype)
        self._bias = None if bias is None else bias.detach()[: self._num_rows].to(dtype)
        self._sums = [
            torch.zeros_like(parameter, dtype=accurate(parameter.dtype)) if wanted else None
            for parameter in (weight, bias)
            for wanted in [learns and parameter is not None and parameter.requires_grad]
        ]
        self.gradients = [total for total in self._sums if total is not None]

    def logits(self, hidden_CD: Tensor) -> Tensor:
        self._hidden_CD = hidden_CD.detach().to(self._dtype)
        with torch.autocast(self._device, enabled=False):
            logits_CV = F.linear(self._hidden_CD, self._weight, self._bias)
        if self._excluded is not None and self._excluded < logits_CV.shape[1]:
            logits_CV[:, self._excluded] = -torch.inf
        return logits_CV

    def back(self, gradient_CV: Tensor) -> Tensor:
        weight_sum, bias_sum = self._sums
        gradient_CV = gradient_CV.to(self._dtype)
        with torch.autocast(self._device, enabled=False):
            rows = slice(self._num_rows)
            if weight_sum is not None and weight_sum.dtype == self._dtype:
                weight_sum[rows].addmm_(gradient_CV.t(), self._hidden_CD)
            elif weight_sum is not None:
                weight_sum[rows].add_(gradient_CV.t() @ self._hidden_CD)
            if bias_sum is not None:
                bias_sum[rows].add_(gradient_CV.sum(0, dtype=bias_sum.dtype))
            return gradient_CV @ self._weight


class ModuleProducts(HeadProducts):
    """Of any module, by its own forward and backward."""

    def __init__(self, head: Head, *, learns: bool) -> None:
        self._head, self._learns = head, learns
        self._parameters = head.learning() if learns else ()
        self.gradients = [torch.zeros_like(p, dtype=accurate(p.dtype)) for p in self._parameters]

    def logits(self, hidden_CD: Tensor) -> Tensor:
        with torch.set_grad_enabled(self._learns):
            self._hidden_CD = hidden_CD.detach().requires_grad_(self._learns)
            self._logits_CV = self._head(self._hidden_CD)
        return self._logits_CV.detach()

    def back(self, gradient_CV: Tensor) -> Tensor:
        gradient_CD, *found = torch.autograd.grad(
            self._logits_CV,
            [self._hidden_CD, *self._parameters],
            gradient_CV.to(self._logits_CV.dtype),
            allow_unused=True,
        )
        del self._logits_CV
        for total, gradient in zip(self.gradients, found, strict=True):
            if gradient is not None:
                total.add_(gradient)
        return gradient_CD


def accurate(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: at least float32."""
    return torch.promote_types(dtype, torch.float32)
