"""Not a test: what a stranger does with saved models. Run by test_stock.py in a process of its own."""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(cases: Path, output: Path) -> None:
    """Logits of every case directory, by plain transformers."""
    ids = load_file(cases / "ids.safetensors")
    logits = {}
    for name in sorted(ids):
        loaded: Any = AutoModelForCausalLM.from_pretrained(cases / name, output_loading_info=True)
        model, info = loaded
        # No tensor missing, unexpected or of another shape: transformers would only warn.
        assert not any(info.values()), (name, info)
        with torch.no_grad():
            logits[name] = model(ids[name]).logits.contiguous()
    save_file(logits, output)


if __name__ == "__main__":
    sys.modules["bitnet_arch"] = None  # type: ignore[assignment]
    main(Path(sys.argv[1]), Path(sys.argv[2]))
