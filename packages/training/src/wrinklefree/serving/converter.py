"""A door to `bitnet_serving`: a checkpoint as a GGUF file, dense or with experts that are all the same.

A model is named by its directory, by a run, or by its `model.safetensors`. What stood at the output is
replaced. Models with experts of their own come later; until then there is no `convert_moe_to_gguf`.
"""

from os import PathLike
from pathlib import Path
from typing import NoReturn

from bitnet_serving import fake_moe
from bitnet_serving.export import export_gguf

__all__ = ["convert_dense_to_fake_moe_gguf", "convert_to_gguf"]


def convert_to_gguf(
    model_path: str | PathLike[str],
    output_path: str | PathLike[str],
    quant_type: str = "i2_s",
    model_name: str | None = None,
) -> Path:
    """Write the model as it is. `i2_s` is for Microsoft's engine; for llama.cpp take `tq2_0`."""
    export_gguf(_named(model_path), output_path, body=quant_type, name=model_name, replace_existing=True)
    return Path(output_path)


def convert_dense_to_fake_moe_gguf(
    model_path: str | PathLike[str],
    output_path: str | PathLike[str],
    num_experts: int = 8,
    top_k: int = 2,
    quant_type: str | None = None,
    model_name: str | None = None,
) -> Path:
    """Write the model with `num_experts` copies of every MLP; a `.gguf` file of a dense one is taken, too."""
    return fake_moe.convert_dense_to_fake_moe_gguf(
        _named(model_path), output_path, num_experts, top_k, quant_type, model_name
    )


def _named(model_path: str | PathLike[str]) -> Path:
    path = Path(model_path)
    return path.parent if path.name == "model.safetensors" else path


def __getattr__(name: str) -> NoReturn:
    if name == "convert_moe_to_gguf":
        raise ImportError(f"{name}: models with experts of their own come later; dense ones are converted")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
