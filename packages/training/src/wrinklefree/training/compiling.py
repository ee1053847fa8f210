"""`torch.compile` for each decoder block; all blocks share their graphs.

λ is an input of the graphs, so a whole ramp needs three (start, between, end). A compiled block passes
by hooks that came after it: what looks into blocks by hooks, as influence does, is `without_compiled_blocks`.
"""

import importlib.util
import os
import shutil
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from bitnet_arch import walk


def compile_blocks(model: nn.Module) -> None:
    """In place, names of parameters stay; where nothing can compile, one line says so."""
    why_not = _why_not()
    if why_not is not None:
        print(f"training.torch_compile: {why_not}; training goes on without", flush=True)
        return
    for layer in walk(model).layers:
        model.get_submodule(layer.path).compile()


def without_compiled_blocks(model: nn.Module) -> AbstractContextManager[object]:
    """Blocks run as they are written, hooks included."""
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


def cpp_compiler() -> str | None:
    """The path of the compiler that torch would call."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _why_not() -> str | None:
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "TORCHDYNAMO_DISABLE=1 is set"
    if cpp_compiler() is None:
        return "no C++ compiler here"
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None
