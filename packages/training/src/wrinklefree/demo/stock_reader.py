"""A script with a process of its own: read a checkpoint with stock transformers and write down its logits.

    python -P stock_reader.py CHECKPOINT TOKENS LOGITS

It prints a line of JSON about what it loaded, and fails when any of our modules was imported on the way.
"""

import json
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file


def main() -> None:
    """Load, run once, save."""
    checkpoint_dir, tokens_path, logits_path = sys.argv[1:]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint_dir, local_files_only=True).eval()
    with torch.no_grad():
        logits = model(input_ids=load_file(tokens_path)["input_ids"]).logits
    save_file({"logits": logits.float().contiguous()}, logits_path)
    ours = {"bitnet_arch", "bitnet_serving", "data_handler", "durable", "wrinklefree"} & set(sys.modules)
    assert not ours, f"stock transformers imported {ours}"
    layer = model.get_decoder().layers[0].self_attn.q_proj
    print(
        json.dumps(
            {
                "model": type(model).__name__,
                "layer": type(layer).__name__,
                "version": transformers.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
