"""Which matrix multiplication does the work: integers where the machine has them, fp32 or bf16 where it does
not.

The product of int8 activations and ternary codes is a sum of integers below 2^24 for every width up to
132,104, so int8, bf16-in-fp32-out and fp32 GEMMs all give the same bits. What differs is speed: without VNNI
torch multiplies int8 in a reference loop, forty times slower than fp32 (docs/experiments.md). On AMD, MKL
takes a slow path for fp32 and oneDNN does not.

Shapes: q [M, K]; codes [N, K].
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

CPU: Mapping[str, Any] = torch.cpu.get_capabilities()
"""Instruction sets and name of this CPU. Read once: a compiled graph must see constants."""


def _cpu_has(*names: str) -> bool:
    return any(bool(CPU.get(name, False)) for name in names)


CPU_HAS_INT8 = _cpu_has("avx512_vnni", "avx_vnni", "amx_int8")
CPU_HAS_BF16 = _cpu_has("avx512_bf16", "amx_bf16", "bf16")
# MKL takes a slow path on AMD. With AMX the oneDNN op could round to bf16, so it is left alone there.
CPU_PREFERS_ONEDNN = (
    "AMD" in str(CPU.get("cpu_name", ""))
    and not _cpu_has("amx_tile", "amx_bf16")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def has_int8_gemm(device_type: str) -> bool:
    """Does `torch._int_mm` run on real int8 instructions there?"""
    return CPU_HAS_INT8 if device_type == "cpu" else device_type == "cuda"


def has_bf16_gemm(device_type: str) -> bool:
    """Is a bf16 GEMM faster than a fp32 one there? A CPU without the instructions emulates it, four times
    slower than fp32.
    """
    return CPU_HAS_BF16 if device_type == "cpu" else device_type != "mps"


def describe_route() -> str:
    """One line for `doctor` and the log: how BitLinear multiplies on this CPU."""
    forward = "int8 (torch._int_mm)" if has_int8_gemm("cpu") else "fp32 holding integers (no VNNI here)"
    backward = "oneDNN fp32" if CPU_PREFERS_ONEDNN else "the default fp32 GEMM"
    low = "bf16" if has_bf16_gemm("cpu") else "fp32 (no bf16 instructions here)"
    return f"forward: {forward}; backward: {backward}, under bf16 autocast {low}"


def integer_product(q: Tensor, codes: Tensor) -> Tensor:
    """q @ codesᵀ with exact integers: int32 or integer-valued fp32, [M, N]."""
    if has_int8_gemm(q.device.type) and _int_mm_takes(q, codes):
        return torch._int_mm(q, codes.t())
    return matmul(q.float(), codes.float().t())


def _int_mm_takes(q: Tensor, codes: Tensor) -> bool:
    if q.device.type != "cuda":
        return True
    # cuBLAS wants more than 16 rows and multiples of 8.
    return q.shape[0] > 16 and q.shape[1] % 8 == 0 and codes.shape[0] % 8 == 0


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the dtype given, whatever autocast says."""
    device_type = a.device.type
    if CPU_PREFERS_ONEDNN and _onednn_takes(a):
        return _onednn_matmul(a, b)
    if torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return a @ b
    return a @ b


def _onednn_takes(a: Tensor) -> bool:
    # The op has no batching rule, and the compiler routes products itself.
    in_eager = not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None
    return in_eager and a.dtype == torch.float32 and a.device.type == "cpu"


def _onednn_matmul(a: Tensor, b: Tensor) -> Tensor:
    """oneDNN's linear op, which takes the second operand transposed, as a view."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return product


def backward_dtype(grad: Tensor) -> torch.dtype:
    """The dtype of the two backward GEMMs: that of the incoming gradient where the machine is fast at it,
    else fp32.
    """
    if grad.dtype in (torch.bfloat16, torch.float16) and not has_bf16_gemm(grad.device.type):
        return torch.float32
    return grad.dtype
