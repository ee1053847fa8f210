"""Per-example gradients of chosen weights, by hooks: one forward and one backward pass per chunk.

    forward   every chosen layer leaves what multiplies its weight (c) and its output
    backward  gives the gradient at each output (r), by `torch.autograd.grad`: no `.grad` is touched
    then      Σₜ rₜ cₜᵀ, projected (`projection.py`)

A layer whose weight meets another tensor than its input (a ternary layer: its norm, its rounding) offers
`effective_input(x)` and is asked for it; the gradient is then the straight-through one. A weight used twice
(tied embedding and head, a shared layer) has one gradient, the sum. The first chunk is compared with
autograd's own weight gradients, so that a layer which does something else is named and not silently wrong.
Norm gains and biases are left out: they are few.

Shapes: B examples, T positions, R × C a weight, D all kept numbers.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from data_handler.influence.config import InfluenceTarget
from data_handler.influence.projection import Projection, make_projection
from durable import UserError

logger = logging.getLogger(__name__)
Examples = TypeVar("Examples")
"""A dataclass of tensors, each with the examples along its first dimension, such as `data_handler.Batch`."""


class ExampleLoss(Protocol):
    """One loss per example: [B]. Examples must not touch one another (no batch statistics)."""

    def __call__(self, model: nn.Module, batch: Any, /) -> Tensor: ...


def num_examples(batch: object) -> int:
    """B."""
    first = dataclasses.fields(cast(Any, batch))[0].name
    return cast(Tensor, getattr(batch, first)).shape[0]


def take(batch: Examples, rows: slice | Tensor) -> Examples:
    """The examples `rows` of a batch (a slice, indices or a mask)."""
    names = [field.name for field in dataclasses.fields(cast(Any, batch))]
    return cast(
        Examples,
        dataclasses.replace(cast(Any, batch), **{name: getattr(batch, name)[rows] for name in names}),
    )


def choose_layers(model: nn.Module, target: InfluenceTarget | Sequence[str]) -> dict[str, nn.Module]:
    """The linear layers and embeddings that `target` (a kind, or names of modules) means."""
    usable: dict[str, nn.Module] = {
        name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)
    }
    if not isinstance(target, InfluenceTarget):
        for name in target:
            if name not in usable:
                raise UserError(
                    "influence layers: no such linear layer or embedding", found=name, choices=usable
                )
        return {name: usable[name] for name in target}
    embeddings = {name for name, m in usable.items() if isinstance(m, nn.Embedding)}
    outputs = {name for name in usable if name not in embeddings and _is_output(model, name, usable)}
    match target:
        case InfluenceTarget.EMBEDDING:
            names = embeddings
        case InfluenceTarget.OUTPUT:
            names = outputs
        case InfluenceTarget.EMBEDDING_AND_OUTPUT:
            names = embeddings | outputs
        case InfluenceTarget.HIDDEN:
            names = set(usable) - embeddings - outputs
        case InfluenceTarget.ALL:
            names = set(usable)
    if not names:
        raise UserError(
            f"influence.target_layers: {type(model).__name__} has no such layer", found=target.value
        )
    return {name: layer for name, layer in usable.items() if name in names}


def _is_output(model: nn.Module, name: str, usable: dict[str, nn.Module]) -> bool:
    find: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    return (
        usable[name] is find()
        if find is not None
        else name.rpartition(".")[2] in ("lm_head", "head", "output")
    )


@dataclass(slots=True)
class _Call:
    """One passage through a layer: what multiplied the weight (indices for an embedding), and the output."""

    layer: nn.Module
    factor: Tensor
    output: Tensor


class GradientExtractor:
    """Per-example gradients of a model as rows of D numbers, one block of columns per weight."""

    def __init__(
        self,
        model: nn.Module,
        loss: ExampleLoss,
        *,
        layers: InfluenceTarget | Sequence[str] = InfluenceTarget.ALL,
        projection_dim: int | None = 256,
        seed: int = 42,
        chunk: int = 8,
    ) -> None:
        self.model = model
        self.loss = loss
        self.chunk = chunk
        self.layers = choose_layers(model, layers)
        self._projections: dict[int, Projection] = {}
        self._names: dict[int, str] = {}
        self.blocks: dict[str, slice] = {}
        """Weight name → its columns."""
        end = 0
        for name, layer in self.layers.items():
            weight = _weight(layer)
            if id(weight) in self._projections:
                continue
            rows, columns = weight.shape
            projection = make_projection((rows, columns), keep=projection_dim, seed=seed, name=name)
            self._projections[id(weight)], self._names[id(weight)] = projection, name
            self.blocks[name] = slice(end, end := end + projection.size)
        self.dim = end
        self._checked = False

    def __call__(self, batch: object) -> Tensor:
        """[B, D] for the B examples of `batch`, on the model's device."""
        parts: list[Tensor] = []
        done, total = 0, num_examples(batch)
        while done < total:
            rows = slice(done, min(done + self.chunk, total))
            part = self._unless_out_of_memory(take(batch, rows))
            if part is None:
                self._shrink(rows.stop - rows.start)
                continue
            parts.append(part)
            done = rows.stop
        return torch.cat(parts) if parts else torch.zeros(0, self.dim)

    def _unless_out_of_memory(self, batch: object) -> Tensor | None:
        try:
            return self._gradients(batch)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
        return None

    def _shrink(self, tried: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if tried == 1:
            raise UserError(
                "influence: the gradients of one example do not fit into memory",
                fix="choose fewer layers (influence.target_layers), less projection_dim, shorter blocks",
            )
        self.chunk = tried // 2
        logger.warning(
            "influence: out of memory with %d examples at once; going on with %d.", tried, self.chunk
        )

    def _gradients(self, batch: object) -> Tensor:
        num = num_examples(batch)
        with torch.enable_grad(), evaluating(self.model), self._recording() as calls:
            losses = self.loss(self.model, batch)
        if losses.shape != (num,):
            raise ValueError(f"An example loss must have shape ({num},), got {tuple(losses.shape)}.")
        weights = (
            [] if self._checked else [_weight(m) for m in self.layers.values() if _weight(m).requires_grad]
        )
        wanted = [call.output for call in calls] + weights
        if not calls:
            raise ValueError("None of the chosen layers took part in the loss.")
        grads = torch.autograd.grad(losses.sum(), wanted, allow_unused=True)
        kept = {key: _accumulator(num, p, losses) for key, p in self._projections.items()}
        for call, grad in zip(calls, grads[: len(calls)], strict=True):
            key = id(_weight(call.layer))
            if grad is not None:
                kept[key] += _outer(call, grad, self._projections[key], num, self._names[key])
        if not self._checked:
            for weight, grad in zip(weights, grads[len(calls) :], strict=True):
                self._check(weight, grad, kept[id(weight)])
            self._checked = True
        return torch.cat([part.flatten(1) for part in kept.values()], dim=1)

    @contextmanager
    def _recording(self) -> Iterator[list[_Call]]:
        """Inside, passages through the chosen layers are written down."""
        calls: list[_Call] = []

        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            x: Tensor = args[0] if args else kwargs["input"]
            with torch.no_grad():
                effective = getattr(layer, "effective_input", None)
                factor = (effective(x) if effective is not None else x).detach()
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            calls.append(_Call(layer, factor, output))
            return output

        unique = {id(layer): layer for layer in self.layers.values()}
        handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in unique.values()]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    def _check(self, weight: Tensor, grad: Tensor | None, kept_BRC: Tensor) -> None:
        """The examples' gradients add up to autograd's, projected the same way."""
        projection = self._projections[id(weight)]
        if grad is None:
            grad = torch.zeros_like(weight)
        expected = projection.columns.project(projection.rows.project(grad.to(kept_BRC).T).T)
        if (kept_BRC.sum(0) - expected).norm() > 0.05 * expected.norm() + 1e-6:
            raise ValueError(
                f"The per-example gradients of {self._names[id(weight)]} do not add up to its gradient: "
                "the layer does more than multiply its input by its weight. "
                "Give it an effective_input(x), or choose other layers."
            )


def _outer(call: _Call, grad: Tensor, projection: Projection, num: int, name: str) -> Tensor:
    """Σₜ rₜ cₜᵀ per example, projected: [B, k_r, k_c]."""
    if grad.shape[0] != num:
        raise ValueError(
            f"{name} sees {grad.shape[0]} rows for {num} examples: choose layers that keep them apart."
        )
    dtype = torch.promote_types(grad.dtype, torch.float32)
    grad_BTN = grad.to(dtype).reshape(num, -1, grad.shape[-1])
    if isinstance(call.layer, nn.Embedding):
        indices_BT = call.factor.expand(grad.shape[:-1]).reshape(num, -1)
        if call.layer.padding_idx is not None:
            grad_BTN = grad_BTN * (indices_BT != call.layer.padding_idx).unsqueeze(-1)
        # transformers' scaled embeddings (Gemma) multiply what they look up.
        grad_BTN = grad_BTN * float(getattr(call.layer, "embed_scale", 1.0))
        rows = projection.rows.select(indices_BT, grad_BTN)
        columns = projection.columns.project(grad_BTN)
    else:
        rows = projection.rows.project(grad_BTN)
        columns = projection.columns.project(call.factor.to(dtype).reshape(num, -1, call.factor.shape[-1]))
    return rows.transpose(1, 2) @ columns


def _accumulator(num: int, projection: Projection, like: Tensor) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.zeros(num, projection.rows.kept, projection.columns.kept, dtype=dtype, device=like.device)


def _weight(layer: nn.Module) -> Tensor:
    return cast(Tensor, layer.weight)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error) or "out of memory" in str(error).lower()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout inside; every module's mode is as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
