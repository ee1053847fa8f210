"""`wrinklefree doctor`: what this machine has, as far as training depends on it. Names no secret."""

import json
import os
import platform
import shutil
import sys
from pathlib import Path

import torch

from bitnet_arch.gemm import describe_route
from wrinklefree.terminal import megabytes, table
from wrinklefree.training.compiling import cpp_compiler
from wrinklefree.versions import installed_versions

INSTRUCTION_SETS = (
    "avx2",
    "avx512_f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "neon",
    "sve",
)

Report = dict[str, dict[str, str]]


def doctor(*, as_json: bool) -> None:
    """Print the report."""
    report = examine()
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    for title, entries in report.items():
        print(title)
        print(table(list(entries.items())))


def examine() -> Report:
    """Everything worth knowing about this machine, by topic."""
    return {
        "versions": installed_versions(),
        "torch": _torch(),
        "cpu": _cpu(),
        "gpu": _gpu(),
        "compiler": {"C++": _compiler()},
        "space": _space(),
        "credentials": {"hugging face": _hugging_face_credential(), "weights & biases": _wandb_credential()},
    }


def _torch() -> dict[str, str]:
    return {
        "build": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "fp32 matmul": torch.get_float32_matmul_precision(),
    }


def _cpu() -> dict[str, str]:
    capabilities = torch.cpu.get_capabilities()
    present = [name for name in INSTRUCTION_SETS if capabilities.get(name)]
    absent = [name for name in INSTRUCTION_SETS[2:7] if not capabilities.get(name)]
    return {
        "name": str(capabilities.get("cpu_name") or platform.processor() or platform.machine()),
        "instructions": ", ".join(present) or "baseline",
        "without": ", ".join(absent) or "nothing that matters here",
        "BitLinear": describe_route(),
    }


def _gpu() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"found": "none; nothing here needs one"}
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        f"cuda:{index}": f"{device.name}, {megabytes(device.total_memory)}"
        for index, device in enumerate(properties)
    }


def _compiler() -> str:
    return cpp_compiler() or (
        "none: torch.compile cannot run, and transformers compiles its BitNet quantisers at first call; "
        "set TORCHDYNAMO_DISABLE=1 there"
    )


def _space() -> dict[str, str]:
    return {"disk here": f"{megabytes(shutil.disk_usage(Path.cwd()).free)} free", "memory": _memory()}


def _memory() -> str:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
        return f"{megabytes(free)} free of {megabytes(total)}"
    if sys.platform == "darwin":
        return megabytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return "unknown"


def _hugging_face_credential() -> str:
    token_path = Path(os.environ.get("HF_HOME", "~/.cache/huggingface"), "token").expanduser()
    return _first_set("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") or (
        "set (file)" if token_path.exists() else "not set"
    )


def _wandb_credential() -> str:
    netrc_path = Path("~/.netrc").expanduser()
    in_netrc = netrc_path.is_file() and "wandb" in netrc_path.read_text(errors="replace")
    return _first_set("WANDB_API_KEY") or ("set (.netrc)" if in_netrc else "not set")


def _first_set(*variables: str) -> str | None:
    """Says which variable is set, never to what."""
    return next((f"set ({name})" for name in variables if os.environ.get(name)), None)
