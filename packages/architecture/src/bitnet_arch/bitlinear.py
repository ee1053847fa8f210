"""BitLinear: a linear layer with ternary weights and int8 activations (BitNet b1.58, arXiv 2402.17764),
trained straight through.

        x ─► SubLN (μ) ─► sparsity ─► Q (λ) ─┐
                                             ├─ product ─► + bias ─► y
                              W ─► Q (λ) ────┘

λ (`quant_amount` for weights, `activation_amount` for activations), μ (`subln_amount`) and the sparsity are
plain Python values on the layer: never in `state_dict`, never global. At λ = 0 the layer is `nn.Linear` to
the bit; at λ = 1 it multiplies integers; between, it blends the quantised values in. Callbacks decide when
they move.

Shapes: x [..., K]; weight [N, K]; y [..., N].
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_arch.quant import dequantize_activations
from bitnet_arch.sparsity import Sparsity, sparsify
from bitnet_arch.subln import SubLN, blend
from bitnet_arch.ternary_cache import WeightCache, shared_activations
from bitnet_arch.ternary_product import TernaryProduct, straight_through
from durable import UserError

DIALS = ("quant_amount", "activation_amount", "subln_amount")
ENDS = ("start", "end")


class BitLinear(nn.Linear):
    """`nn.Linear` whose product is ternary: the same parameters under the same names, so checkpoints are
    interchangeable.
    """

    quantizes_activations: ClassVar[bool] = True
    input_norm: SubLN | None
    _stage: str
    """The end at which all dials stand, or "between".

    Text, because the compiler would make a number an input and ask for its value.
    """
    _dials: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        input_norm: SubLN | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.input_norm = input_norm
        self.quant_amount = 1.0
        self.activation_amount = 1.0 if self.quantizes_activations else 0.0
        self.subln_amount = 1.0
        self.sparsity: Sparsity | None = None
        self.backward_dtype: torch.dtype | None = None
        """dtype of the two backward GEMMs; None follows the incoming gradient.

        bf16 under fp32 training is faster, with bf16 noise.
        """

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, input_norm: SubLN | None = None) -> Self:
        """A ternary layer over the very parameters of `linear`."""
        layer = cls(linear.in_features, linear.out_features, bias=False, input_norm=input_norm, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.normalized(x))

    def normalized(self, x: Tensor) -> Tensor:
        """The input after SubLN, blended in by μ."""
        if self.input_norm is None or self._is("subln_amount", 0):
            return x
        if self._is("subln_amount", 1):
            normed: Tensor = self.input_norm(x)
            return normed
        return blend(x, self.input_norm(x), self._dial("subln_amount"))

    def project(self, x: Tensor) -> Tensor:
        """The product with the weight, at the present λ. `x` is the input after SubLN."""
        if self.sparsity is not None:
            x = sparsify(x, self.sparsity)
        if self._is("quant_amount", 0) and self._is("activation_amount", 0):
            return F.linear(x, self.weight, self.bias)
        if self._is("quant_amount", 1) and self._is("activation_amount", 1):
            return self._integer_product(x)
        return F.linear(self._blended_input(x), self._blended_weight(), self.bias)

    def effective_input(self, x: Tensor) -> Tensor:
        """The tensor that multiplies the weight: after SubLN, sparsity and quantisation."""
        x = self.normalized(x)
        return self._blended_input(x if self.sparsity is None else sparsify(x, self.sparsity))

    def effective_weight(self) -> Tensor:
        """The weight that multiplies it, at the present λ."""
        return self._blended_weight()

    def _integer_product(self, x: Tensor) -> Tensor:
        device_type = x.device.type
        low = torch.is_autocast_enabled(device_type)
        out_dtype = torch.get_autocast_dtype(device_type) if low else x.dtype
        q, absmax = shared_activations(x)
        codes, scale = self._cache.get(self.weight)
        dtypes = (out_dtype, self.backward_dtype)
        y: Tensor = TernaryProduct.apply(x, self.weight, q, absmax, codes, scale, *dtypes)
        return y if self.bias is None else y + self.bias.to(out_dtype)

    def _blended_weight(self) -> Tensor:
        if self._is("quant_amount", 0):
            return self.weight
        value = self._cache.get(self.weight).value()
        mixed = blend(self.weight.detach().float(), value, self._dial("quant_amount"))
        return straight_through(self.weight, mixed)

    def _blended_input(self, x: Tensor) -> Tensor:
        if not self.quantizes_activations or self._is("activation_amount", 0):
            return x
        value = dequantize_activations(*shared_activations(x))
        mixed = blend(x.detach().float(), value, self._dial("activation_amount"))
        return straight_through(x, mixed)

    def _is(self, dial: str, end: int) -> bool:
        """Does a dial stand at this end? A compiled graph asks of all dials together, so that a ramp has
        three graphs: start, between, end.

        Comparing each float there would compile again whenever one of them arrives; the blend is exact at
        both ends anyway.
        """
        if torch.compiler.is_compiling():
            return self._stage == ENDS[end]
        return bool(getattr(self, dial) == end)

    def _dial(self, dial: str) -> float | Tensor:
        """The value of a dial.

        A compiled graph takes it as an input: a Python float is a constant there, and compiles anew as it
        moves.
        """
        if torch.compiler.is_compiling():
            return self._dials[DIALS.index(dial)]
        value: float = getattr(self, dial)
        return value

    def _note_dials(self) -> None:
        values = [self.__dict__.get(dial, 1.0) for dial in DIALS]
        felt = values if self._modules.get("input_norm") is not None else values[:2]
        ends = (ENDS[end] for end in (0, 1) if all(value == end for value in felt))
        self.__dict__["_stage"] = next(ends, "between")
        self.__dict__["_dials"] = torch.tensor(values, dtype=torch.float64, device="cpu")

    def forget_quantized_weight(self) -> None:
        """Quantise the weight anew at its next use."""
        self._cache.forget()

    @property
    def _cache(self) -> WeightCache:
        cache: WeightCache = self.__dict__["_weight_cache"]
        return cache

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # FSDP2 and load_state_dict(assign=True) put other parameters here, whose version says nothing.
        if name == "weight":
            self.__dict__["_weight_cache"] = WeightCache()
        if name == "input_norm" or name in DIALS:
            self._note_dials()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._cache.forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, λ={self.quant_amount:g}"


class BitLinearNoActivationQuant(BitLinear):
    """Ternary weights, activations as they come."""

    quantizes_activations = False


def bitlinears(model: nn.Module) -> Iterator[BitLinear]:
    """Every ternary layer of a model."""
    return (module for module in model.modules() if isinstance(module, BitLinear))


def set_quant_amount(model: nn.Module, amount: float, *, activations: bool = True) -> None:
    """Set λ of all ternary layers. With `activations=False` activations stay quantised whatever λ is."""
    amount = _checked_amount("quant_amount", amount)
    for layer in bitlinears(model):
        layer.quant_amount = amount
        if layer.quantizes_activations:
            layer.activation_amount = amount if activations else 1.0


def set_subln_amount(model: nn.Module, amount: float) -> None:
    """Set μ of every SubLN that conversion added; a norm that was the architecture's own stays in full."""
    amount = _checked_amount("subln_amount", amount)
    for layer in bitlinears(model):
        if layer.input_norm is None or not layer.input_norm.is_own:
            layer.subln_amount = amount


def set_sparsity(model: nn.Module, sparsity: Sparsity | None) -> None:
    """Set the activation sparsity of all ternary layers; None is dense."""
    for layer in bitlinears(model):
        layer.sparsity = sparsity


def set_backward_dtype(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Set the dtype of the backward GEMMs of all ternary layers; None follows the incoming gradient."""
    for layer in bitlinears(model):
        layer.backward_dtype = dtype


def forget_quantized_weights(model: nn.Module) -> None:
    """Quantise every weight anew at its next use.

    Needed only after writing through `weight.data`, which torch cannot see.
    """
    for layer in bitlinears(model):
        layer.forget_quantized_weight()


def _checked_amount(name: str, amount: float) -> float:
    if not 0 <= amount <= 1:
        raise UserError(
            f"{name} must lie between 0 and 1", found=str(amount), fix="pass a share between 0 and 1"
        )
    return float(amount)
