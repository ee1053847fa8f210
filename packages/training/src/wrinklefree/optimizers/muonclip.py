"""MuonClip's step: Muon for groups with `use_muon`, fused AdamW for the others, in one optimizer.

Muon (2502.16982): momentum B ← βB + (1-β)G, Nesterov's U = (1-β)G + βB, O = orthogonalized(U),
W ← (1 - lr·decay)·W - lr·0.2·√max(n, m)·O. The factor gives O the size of an AdamW update, so learning rates
and decay mean the same in both. The clipping of attention logits (2507.20534) needs the forward pass and is
in `qk_clip`.

Steps equal those of `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` and `torch.optim.AdamW(fused=True)`,
to the bit where Newton-Schulz runs in bf16 as torch's does.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam

from wrinklefree.optimizers.newton_schulz import best_dtype, orthogonalized

RMS_OF_ADAMW = 0.2


class MuonClip(Optimizer):
    """Groups carry `use_muon`; with it `lr`, `weight_decay` and `momentum` count, else AdamW's options."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        newton_schulz_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "use_muon": False}
        super().__init__(params, defaults)
        self.newton_schulz_dtype = newton_schulz_dtype
        """None takes the fastest of the device."""
        for group in self.param_groups:
            if group["use_muon"]:
                group.setdefault("momentum", momentum)
                assert all(parameter.ndim == 2 for parameter in group["params"]), "Muon is for matrices"
            else:
                group.setdefault("betas", list(betas))
                group.setdefault("eps", eps)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["use_muon"]:
                for parameter in parameters:
                    self._muon_step(parameter, group)
            elif parameters:
                self._adam_step(parameters, group)
        return loss

    def _muon_step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        # One matrix after the other: only one update is alive at a time.
        grad = _grad(parameter)
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum_buffer = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(momentum_buffer, group["momentum"])
        dtype = self.newton_schulz_dtype or best_dtype(update.device.type)
        size = RMS_OF_ADAMW * math.sqrt(max(parameter.shape))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonalized(update, dtype), alpha=-group["lr"] * size)

    def _adam_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                # Where the fused kernel wants it, and exact in fp32 up to 16 million steps.
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        adam(
            parameters,
            [_grad(parameter) for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            decoupled_weight_decay=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
