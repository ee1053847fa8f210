"""How many bytes of tensors are alive at once, counted operation by operation.

Every storage that an operation makes is added, and taken off when it goes. With `fake=True` tensors have
shapes and no data (`torch._subclasses.FakeTensor`): the same code runs, for the device that is named, and
takes no memory. Operations on real tensors alone stay real, so labels can be looked at on the way.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class LiveTensors(TorchDispatchMode):
    """Use as a context manager around what is to be counted."""

    def __init__(self, *, fake: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._fake = FakeTensorMode() if fake else None
        self._alive: dict[int, weakref.ref[Any]] = {}

    def watch(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that were there before; how many bytes they add."""
        before = self.now
        for tensor in tensors:
            self._see(tensor)
        return self.now - before

    def restart_peak(self) -> None:
        self.peak = self.now

    def made_fake(self, model: nn.Module, device: torch.device) -> None:
        """Put fake tensors in the place of a model's own; what was shared stays shared."""
        fakes: dict[int, Tensor] = {}
        for module in model.modules():
            places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for place in places:
                for name, tensor in place.items():
                    if tensor is not None and not isinstance(tensor, FakeTensor):
                        place[name] = fakes.setdefault(id(tensor), self._like(tensor, device))

    def fake_like(self, tensor: Tensor) -> Tensor:
        return self._like(tensor, tensor.device)

    def _like(self, tensor: Tensor, device: torch.device) -> Tensor:
        assert self._fake is not None
        with self._fake:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = self._run(func, args, kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return result

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        fake = self._fake
        if fake is None:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs)

        def faked(leaf: Any) -> Any:
            is_real = isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor)
            return fake.from_tensor(leaf) if is_real else leaf

        args, kwargs = tree_map(faked, (args, kwargs))
        with fake:
            return func(*args, **kwargs)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._alive.get(key)
        if known is not None and known() is storage:
            return
        num_bytes = storage.nbytes()

        def gone(_: Any) -> None:
            self._alive.pop(key, None)
            self.now -= num_bytes

        self._alive[key] = weakref.ref(storage, gone)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
