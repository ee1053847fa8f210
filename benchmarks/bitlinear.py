"""How fast is a ternary training step, against the dense one and against other ternary layers?

    uv run python benchmarks/bitlinear.py                        every variant, fp32 and bf16 autocast
    uv run --group bench python benchmarks/bitlinear.py          torchao as well
    uv run python benchmarks/bitlinear.py --check-only           correctness against float64, no timing
    uv run python benchmarks/bitlinear.py --only dense,ours --layers 2 --repeats 9

One process, one thread, CPU time (a busy machine stretches wall time), variants alternate inside every
repeat, medians with the quartiles. A step is forward + backward of a small Llama: width 576, 6 layers,
vocabulary 8192, 4 × 256 tokens. Ratios are against `dense`, which is `nn.Linear` as it comes; `+onednn`
variants run with torch's precision switch on, which sends fp32 products to oneDNN (twice as fast on AMD). On
a GPU (--device cuda) time is wall time between synchronisations.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_arch import BitLinear, gemm
from bitnet_arch.quant import quantize_activations, quantize_weight

MakeLinear = Callable[[int, int], nn.Module]
HEAD_DIM = 64


@dataclass(frozen=True)
class Variant:
    """One way to build the linear layers of the model."""

    make: MakeLinear
    compiled: bool = False
    onednn: bool = False
    dtypes: tuple[str, ...] = ("fp32", "bf16")


@dataclass
class Result:
    """What was measured of one variant in one dtype."""

    step_ms: list[float] = field(default_factory=list)
    saved_mib: float = 0.0
    loss: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.step_ms)


# --- the layers ------------------------------------------------------------------------------------------
# ----------------------


def dense(in_features: int, out_features: int) -> nn.Module:
    return nn.Linear(in_features, out_features, bias=False)


def ours(in_features: int, out_features: int) -> nn.Module:
    return BitLinear(in_features, out_features)


def ours_bf16_backward(in_features: int, out_features: int) -> nn.Module:
    layer = BitLinear(in_features, out_features)
    layer.backward_dtype = torch.bfloat16
    return layer


class Textbook(nn.Linear):
    """Fake quantisation with the detach trick, as most code on the web has it."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().mean().clamp(min=1e-5)
        weight = self.weight + ((self.weight / scale).round().clamp(-1, 1) * scale - self.weight).detach()
        step = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return F.linear(x + ((x * step).round().clamp(-128, 127) / step - x).detach(), weight)


def textbook(in_features: int, out_features: int) -> nn.Module:
    return Textbook(in_features, out_features, bias=False)


def autobitlinear(in_features: int, out_features: int) -> nn.Module:
    from transformers.integrations.bitnet import AutoBitLinear

    return AutoBitLinear(in_features, out_features, bias=False, online_quant=True)


def torchao_bitnet(in_features: int, out_features: int) -> nn.Module:
    from torchao.prototype.quantized_training import bitnet
    from torchao.quantization import quantize_

    def product(a: Tensor, b: Tensor, row_scale: Tensor, column_scale: Tensor) -> Tensor:
        return torch._int_mm(a, b) * column_scale.view(-1) * row_scale.view(-1, 1)

    # Its kernel is Triton for CUDA; this is its own fallback, which it does not choose when Triton can be
    # imported.
    bitnet.scaled_int8_mm = product
    linear = nn.Linear(in_features, out_features, bias=False)
    quantize_(linear, bitnet.BitNetTrainingConfig())
    return linear


VARIANTS = {
    "dense": Variant(dense),
    "dense+onednn": Variant(dense, onednn=True),
    "dense compiled": Variant(dense, compiled=True),
    "dense compiled+onednn": Variant(dense, compiled=True, onednn=True),
    "textbook": Variant(textbook),
    "transformers AutoBitLinear": Variant(autobitlinear),
    # Under CPU autocast torchao stops with a dtype mismatch.
    "torchao": Variant(torchao_bitnet, dtypes=("fp32",)),
    "ours": Variant(ours),
    "ours+onednn": Variant(ours, onednn=True),
    "ours compiled": Variant(ours, compiled=True),
    "ours compiled+onednn": Variant(ours, compiled=True, onednn=True),
    "ours, bf16 backward": Variant(ours_bf16_backward, dtypes=("fp32",)),
}


# --- the model -------------------------------------------------------------------------------------------
# ----------------------


class Block(nn.Module):
    """A Llama block with grouped queries."""

    def __init__(self, make: MakeLinear, width: int, hidden: int, num_kv_heads: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = make(width, width), make(width, width)
        self.k, self.v = make(width, num_kv_heads * HEAD_DIM), make(width, num_kv_heads * HEAD_DIM)
        self.gate, self.up, self.down = make(width, hidden), make(width, hidden), make(hidden, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.attention_norm(x)
        q, k, v = (
            layer(h).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        q, k = (rotate(heads, cos, sin).to(v.dtype) for heads in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(attended.transpose(1, 2).flatten(-2))
        h = self.mlp_norm(x)
        y: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Decoder(nn.Module):
    """Embedding, blocks, norm, dense head, next-token loss."""

    def __init__(self, make: MakeLinear, options: argparse.Namespace) -> None:
        super().__init__()
        self.embedding = nn.Embedding(options.vocab, options.width)
        self.blocks = nn.ModuleList(
            Block(make, options.width, options.hidden, options.kv_heads) for _ in range(options.layers)
        )
        self.norm, self.head = nn.RMSNorm(options.width), dense(options.width, options.vocab)
        angles = torch.outer(torch.arange(options.tokens).float(), 1e4 ** -(torch.arange(32).float() / 32))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x)).float().flatten(0, 1)
        return F.cross_entropy(logits[:-1], tokens.flatten()[1:])


# --- correctness -----------------------------------------------------------------------------------------
# ----------------------


def errors(
    make: MakeLinear, dtype: torch.dtype, *, is_dense: bool, device: str
) -> tuple[float, float, float]:
    """Norm-relative error of forward, input gradient and weight gradient against float64.

    The reference takes the contract's integers; one token is zero and one is fifty times louder.
    """
    torch.manual_seed(1)
    x = torch.randn(96, 576).to(dtype).float()
    x[3] *= 50
    x[4] = 0
    weight, grad = (torch.randn(384, 576) * 0.02).to(dtype).float(), torch.randn(96, 384).to(dtype).float()
    layer = make(576, 384).to(device)
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(weight)

    x_leaf = x.to(device).requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = layer(x_leaf)
    y.backward(grad.to(device, y.dtype))
    found = (y.detach(), x_leaf.grad, getattr(layer.weight.grad, "_data", layer.weight.grad))

    x64, weight64 = x.double(), weight.double()
    if not is_dense:
        (q, absmax), (codes, scale) = quantize_activations(x), quantize_weight(weight)
        x64, weight64 = q.double() * absmax.double() / 127, codes.double() * scale.double()
    expected = (x64 @ weight64.t(), grad.double() @ weight64, grad.double().t() @ x64)
    pairs = zip(found, expected, strict=True)
    y_error, x_error, weight_error = (
        float((a.detach().double().cpu() - b.detach()).norm() / b.detach().norm()) for a, b in pairs
    )
    return y_error, x_error, weight_error


def check(names: list[str], device: str) -> bool:
    """Print the errors of every variant and tell whether ours keep their bounds."""
    print(
        "| variant | fp32 y | fp32 dx | fp32 dW | bf16 y | bf16 dx | bf16 dW |\n|---|---|---|---|---|---|---|"
    )
    rounding = torch.finfo(torch.bfloat16).eps
    holds = True
    for name in names:
        variant = VARIANTS[name]
        if variant.compiled:
            continue
        row = []
        for dtype, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            if label not in variant.dtypes:
                row += ["–"] * 3
                continue
            route_to_onednn(variant.onednn)
            found = errors(variant.make, dtype, is_dense=variant.make is dense, device=device)
            row += [f"{error:.1e}" for error in found]
            if variant.make is ours:
                bounds = (1e-7, 1e-6, 1e-6) if label == "fp32" else (rounding, rounding, rounding)
                holds &= all(error <= bound for error, bound in zip(found, bounds, strict=True))
        print(f"| {name} | {' | '.join(row)} |", flush=True)
    return holds


# --- timing ----------------------------------------------------------------------------------------------
# ----------------------


def route_to_onednn(on: bool) -> None:
    """The process-wide precision switch.

    It belongs to the application; here the benchmark is the application.
    """
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if on else "none"  # type: ignore[attr-defined]


def build(name: str, options: argparse.Namespace) -> nn.Module:
    """A model with the same initial weights for every variant."""
    torch.manual_seed(0)
    reference = Decoder(dense, options).state_dict()
    model = Decoder(VARIANTS[name].make, options)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            getattr(parameter, "_data", parameter).copy_(reference[key])
    if VARIANTS[name].compiled:
        for block in model.blocks:
            block.compile(fullgraph=True)
    return model.to(options.device)


def forward_backward(model: nn.Module, tokens: Tensor, dtype: str, device: str) -> Tensor:
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
        loss: Tensor = model(tokens)
    loss.backward()
    return loss.detach()


def timed_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, dtype: str, device: str
) -> float:
    """Milliseconds of forward and backward; the optimizer step that makes weights stale is not counted."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    forward_backward(model, tokens, dtype, device)
    if device == "cuda":
        torch.cuda.synchronize()
    elapsed = clock() - start
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return 1e3 * elapsed


def saved_mib(model: nn.Module, tokens: Tensor, dtype: str, device: str) -> float:
    """What autograd keeps for the backward pass: every storage once, parameters left out."""
    own = {getattr(p, "_data", p).untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def remember(value: Tensor) -> Tensor:
        storage = getattr(value, "_data", value).untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda value: value):
        forward_backward(model, tokens, dtype, device)
    model.zero_grad(set_to_none=True)
    return sum(sizes.values()) / 2**20


def measure(names: list[str], dtype: str, options: argparse.Namespace) -> dict[str, Result]:
    """Warm every variant, then let them take turns."""
    tokens = torch.randint(0, options.vocab, (options.batch, options.tokens), device=options.device)
    runs: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}
    results: dict[str, Result] = {}
    for name in names:
        route_to_onednn(VARIANTS[name].onednn)
        model = build(name, options)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-4, fused=name != "torchao"
        )
        result = Result(loss=float(forward_backward(model, tokens, dtype, options.device)))
        model.zero_grad(set_to_none=True)
        result.saved_mib = saved_mib(model, tokens, dtype, options.device)
        runs[name], results[name] = (model, optimizer), result
    for _ in range(options.repeats):
        for name, (model, optimizer) in runs.items():
            route_to_onednn(VARIANTS[name].onednn)
            results[name].step_ms.append(timed_step(model, optimizer, tokens, dtype, options.device))
    return results


def print_table(dtype: str, results: dict[str, Result], num_tokens: int) -> None:
    base = results.get("dense") or next(iter(results.values()))
    print(f"\n## {dtype}\n")
    print("| variant | step ms | quartiles | tokens/s | speed × | saved MiB | saved × | loss |")
    print("|---" * 8 + "|")
    for name, result in results.items():
        low, _, high = statistics.quantiles(result.step_ms, n=4)
        # Ratios of the same repeat: what slows the machine down slows both.
        speed = statistics.median(b / r for b, r in zip(base.step_ms, result.step_ms, strict=True))
        share = result.saved_mib / base.saved_mib
        rate = 1e3 * num_tokens / result.median
        times = f"{result.median:.0f} | {low:.0f}–{high:.0f} | {rate:.0f} | {speed:.2f}"
        print(f"| {name} | {times} | {result.saved_mib:.1f} | {share:.2f} | {result.loss:.4f} |", flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check-only", action="store_true", help="errors against float64, no timing")
    parser.add_argument("--only", help="variants to run, separated by commas: " + ", ".join(VARIANTS))
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    for name, default in (("width", 576), ("hidden", 1536), ("layers", 6), ("kv-heads", 3), ("vocab", 8192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step")
    parser.add_argument("--json", type=Path, help="write the numbers there as well")
    options = parser.parse_args()
    unknown = set((options.only or "").split(",")) - {"", *VARIANTS}
    if unknown:
        parser.error(f"unknown variant {sorted(unknown)[0]!r}; choose from: {', '.join(VARIANTS)}")
    return options


def main() -> int:
    options = parse_options()
    torch.set_num_threads(options.threads)
    names = options.only.split(",") if options.only else list(VARIANTS)
    if "torchao" in names and (reason := why_no_torchao(options.device)):
        names.remove("torchao")
        print(f"torchao is left out: {reason}")
    print(f"torch {torch.__version__}, {gemm.CPU.get('cpu_name', 'CPU')}, {options.threads} thread(s)")
    print(f"BitLinear here: {gemm.describe_route()}\n")
    if not check(names, options.device):
        print("error: our layer is further from float64 than its bounds", file=sys.stderr)
        return 1
    if options.check_only:
        return 0
    numbers = {}
    for dtype in options.dtypes.split(","):
        results = measure([name for name in names if dtype in VARIANTS[name].dtypes], dtype, options)
        print_table(dtype, results, options.batch * options.tokens)
        numbers[dtype] = {name: asdict(result) for name, result in results.items()}
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1))
    return 0


def why_no_torchao(device: str) -> str | None:
    """A peer that cannot be timed is left out with its reason."""
    if importlib.util.find_spec("torchao") is None:
        return "not installed; `uv run --group bench` has it"
    if not gemm.has_int8_gemm(device):
        return "its int8 product runs a reference loop on this CPU, a minute per step"
    return None


if __name__ == "__main__":
    sys.exit(main())
