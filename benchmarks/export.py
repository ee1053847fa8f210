"""What does an export cost, and how fast is what it writes?

    uv run python benchmarks/export.py                 SmolLM2-135M's shape, minutes
    uv run python benchmarks/export.py --check-only    the tiny model: both ways say the same

Against `gguf`, llama.cpp's own package: `quantize` in numpy and `GGUFWriter`, of the same weights in the
shapes of our file (which is wider where a block asks for it), with the same metadata. CPU seconds of one
thread, medians of turns with the least and the most; peak memory in a child of its own, above its imports
and in all. Then what `wrinklefree bench` says of each file; Q4_0, which loses, is written by `gguf`.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from resident import forget_peak, resident
from safetensors.torch import load_file
from shapes import SMOLLM2
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bitnet_arch import ConversionConfig, convert_to_bitnet, load_packed, quantize_weight, save_bitnet
from bitnet_arch.testing import tiny_llama
from bitnet_serving.bench import bench
from bitnet_serving.checkpoint_source import open_source
from bitnet_serving.export import export_gguf
from bitnet_serving.gguf_reader import GGUFFile, read_gguf
from bitnet_serving.testing import byte_level_tokenizer

BODIES = ("tq2_0", "tq1_0", "q8_0", "f16")
TYPES = {"tq2_0": Type.TQ2_0, "tq1_0": Type.TQ1_0, "q8_0": Type.Q8_0, "f16": Type.F16, "q4_0": Type.Q4_0}
WRITERS = ("ours", "gguf")
FP16_STEP = 2**-10


def save(directory: Path, *, tiny: bool) -> Path:
    torch.manual_seed(0)
    model: PreTrainedModel = tiny_llama() if tiny else LlamaForCausalLM(LlamaConfig(**SMOLLM2))
    convert_to_bitnet(model, ConversionConfig())
    return save_bitnet(model, directory, tokenizer=byte_level_tokenizer())


def write(writer: str, body: str, checkpoint: Path, out: Path, like: Path) -> None:
    if writer == "ours":
        export_gguf(checkpoint, out, body=body, replace_existing=True)
    else:
        write_with_gguf(body, checkpoint, out, read_gguf(like))


def write_with_gguf(body: str, checkpoint: Path, out: Path, like: GGUFFile) -> None:
    """With shapes and metadata of `like`; q and k stay in the order of transformers, which costs no less."""
    tensors = load_file(checkpoint / "model.safetensors")
    layers = like.metadata["llama.block_count"]
    assert isinstance(layers, int)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    writer = gguf.GGUFWriter(out, "llama")
    for key, value in like.metadata.items():
        if key != "general.architecture":
            add_value(writer, key, value)
    for name, tensor in tensors.items():
        new = names.get_name(name, try_suffixes=(".weight",))
        assert new is not None, name
        kind = TYPES[body] if name.endswith("_proj.weight") else Type.F32 if tensor.ndim == 1 else Type.F16
        if body == "q8_0" and tensor.ndim == 2:
            kind = Type.Q8_0
        values = tensor.float()
        if name.endswith("_proj.weight"):
            codes, scale = quantize_weight(tensor)
            values = codes * scale
        shape = like.tensors[new].shape
        pads = [(0, wide - narrow) for wide, narrow in zip(shape, values.shape, strict=True)]
        data = gguf.quantize(np.pad(values.numpy(), pads), kind)
        writer.add_tensor(new, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def check() -> bool:
    """Matrices that keep their place, read by `gguf` from both files, are the same but for rounded scales."""
    with tempfile.TemporaryDirectory() as name:
        checkpoint, ours, theirs = save(Path(name) / "model", tiny=True), Path(name) / "a", Path(name) / "b"
        for body in BODIES:
            write("ours", body, checkpoint, ours, ours)
            write("gguf", body, checkpoint, theirs, ours)
            expected = {tensor.name: tensor for tensor in gguf.GGUFReader(theirs).tensors}
            for tensor in gguf.GGUFReader(ours).tensors:
                if "ffn" in tensor.name and "norm" not in tensor.name:
                    found = gguf.dequantize(tensor.data, tensor.tensor_type)
                    other = expected[tensor.name]
                    values = gguf.dequantize(other.data, other.tensor_type)
                    if not np.allclose(found, values, rtol=FP16_STEP, atol=0):
                        print(f"{body}: {tensor.name} differs")
                        return False
    return True


def peak(writer: str, body: str, checkpoint: Path, out: Path, like: Path) -> tuple[float, float]:
    """MB above what imports took, and in all, of a process of its own."""
    command = [sys.executable, __file__, "--peak", writer, body, str(checkpoint), str(out), str(like)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
    above, total = map(float, output.split()[-2:])
    return above / 1e6, total / 1e6


def print_peak(writer: str, body: str, checkpoint: str, out: str, like: str) -> None:
    forget_peak()
    before = resident("VmHWM")
    write(writer, body, Path(checkpoint), Path(out), Path(like))
    print(resident("VmHWM") - before, resident("VmHWM"))


def entropy(checkpoint: Path) -> tuple[int, float]:
    """Ternary weights, and bits that each of their codes holds."""
    counts: Counter[int] = Counter()
    for weight in load_packed(checkpoint).values():
        for code in (-1, 0, 1):
            counts[code] += int((weight.codes == code).sum())
    total = counts.total()
    return total, -sum(count / total * math.log2(count / total) for count in counts.values())


def costs(checkpoint: Path, files: dict[str, Path], scratch: Path, *, repeats: int) -> bool:
    seconds: dict[tuple[str, str], list[float]] = {}
    opening = []
    for _ in range(repeats):
        start = time.process_time()
        open_source(checkpoint)
        opening.append(time.process_time() - start)
        for body in BODIES:
            for writer in WRITERS:
                out = files[body] if writer == "ours" else scratch
                start = time.process_time()
                write(writer, body, checkpoint, out, files[body])
                seconds.setdefault((writer, body), []).append(time.process_time() - start)
    num_weights, bits = entropy(checkpoint)
    print(f"{num_weights:,} ternary weights, {bits:.3f} bits each by their entropy: ", end="")
    print(f"{num_weights * bits / 8e6:.1f} MB\n")
    print("| | CPU s, median | least to most | peak MB above imports | in all | file MB | projections MB |")
    print("|---|---|---|---|---|---|---|")
    for (writer, body), found in seconds.items():
        above, total = peak(writer, body, checkpoint, scratch, files[body])
        out = files[body] if writer == "ours" else scratch
        tensors = read_gguf(files[body]).tensors
        projections = sum(
            t.num_bytes for n, t in tensors.items() if n.startswith("blk.") and len(t.shape) == 2
        )
        print(
            f"| {writer}, {body} | {statistics.median(found):.2f} | {min(found):.2f}–{max(found):.2f} "
            f"| {above:.0f} | {total:.0f} | {out.stat().st_size / 1e6:.1f} | {projections / 1e6:.1f} |"
        )
    median = {key: statistics.median(found) for key, found in seconds.items()}
    to_f16 = median["ours", "tq2_0"] / median["ours", "f16"]
    to_gguf = median["ours", "tq2_0"] / median["gguf", "tq2_0"]
    checked = statistics.median(opening)
    after = (median["ours", "tq2_0"] - checked) / median["gguf", "tq2_0"]
    print(f"\ntq2_0 takes {to_f16:.2f} × our f16 (at most 1.3), {to_gguf:.3f} × gguf's tq2_0 (at most 1/3);")
    print(f"without the {checked:.2f} s for the checkpoint's checksums and architecture: {after:.3f} ×\n")
    return to_f16 <= 1.3 and to_gguf <= 1 / 3


def speeds(files: dict[str, Path], *, threads: int) -> None:
    print("| | file MB | prefill t/s | decode t/s | MB a token | share of bandwidth |")
    print("|---|---|---|---|---|---|")
    for name, path in files.items():
        found = bench(path, threads=threads, prompt_tokens=128, new_tokens=64)
        print(
            f"| {name} | {found.file_bytes / 1e6:.1f} | {found.prefill_tokens_per_second:.1f} "
            f"| {found.decode_tokens_per_second:.1f} | {found.bytes_per_token / 1e6:.1f} "
            f"| {found.share_of_bandwidth:.0%} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check-only", action="store_true", help="both ways say the same, no numbers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        print_peak(*options.peak)
        return 0
    if options.check_only:
        print("gguf reads the same from both" if (same := check()) else "error: gguf reads something else")
        return 0 if same else 1
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        checkpoint = save(directory / "model", tiny=False)
        files = {body: directory / f"{body}.gguf" for body in BODIES}
        in_bounds = costs(checkpoint, files, directory / "scratch.gguf", repeats=options.repeats)
        q4_0 = directory / "q4_0.gguf"
        write("gguf", "q4_0", checkpoint, q4_0, files["f16"])
        speeds(files | {"q4_0 (gguf)": q4_0}, threads=1)
    print(f"\nload {os.getloadavg()[0]:.1f}")
    return 0 if in_bounds else 1


if __name__ == "__main__":
    sys.exit(main())
