"""An optimizer that tells the influence tracker about every step it takes.

It is a `torch.optim.Optimizer`, so schedulers and scalers accept it, and it owns nothing: groups and state
are those of the optimizer inside. `step` runs once per optimizer step, whatever the number of micro-batches,
so the tracker is asked exactly once.
"""

from collections.abc import Callable
from typing import Any, overload

from torch.optim import Optimizer

from data_handler.influence.tracker import InfluenceTracker


class InfluenceAwareOptimizer(Optimizer):
    """Steps `inner`, counts, and asks `tracker` to move the mixture when that is due."""

    def __init__(self, inner: Optimizer, tracker: InfluenceTracker, *, samples_per_step: int) -> None:
        self.inner = inner
        self.tracker = tracker
        self.samples_per_step = samples_per_step
        self.num_steps = 0
        super().__init__(inner.param_groups, inner.defaults)
        self._share()

    def _share(self) -> None:
        """Look at the inner optimizer's own lists: loading a state makes new ones there."""
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = self.inner.step() if closure is None else self.inner.step(closure)
        self.num_steps += 1
        self.tracker.on_step_end(self.num_steps, self.num_steps * self.samples_per_step)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if not hasattr(self, "param_groups") or self.param_groups is not self.inner.param_groups:
            super().add_param_group(param_group)  # while `Optimizer.__init__` collects what the inner one has
        else:
            self.inner.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, which it loads as it is, with the tracker's beside it."""
        influence = {"num_steps": self.num_steps, "tracker": self.tracker.state_dict()}
        return {**self.inner.state_dict(), "influence": influence}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also takes the state of a plain optimizer; counting then starts anew."""
        influence = state_dict.get("influence")
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != "influence"})
        self._share()
        if influence is not None:
            self.num_steps = int(influence["num_steps"])
            self.tracker.load_state_dict(influence["tracker"])
