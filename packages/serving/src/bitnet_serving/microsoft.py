"""The commands of Microsoft's BitNet, as its `run_inference_server.py` and `run_inference.py` make them.

github.com/microsoft/BitNet at commit 16da220; `extern/README.md` says how it is built. Those scripts only
join a command line, and leave the program behind when they are stopped, so it is started without them.
"""

from collections.abc import Sequence
from pathlib import Path

from durable import UserError

SERVER, CLI = "llama-server", "llama-cli"


def built(bitnet_path: Path, name: str) -> Path:
    """One of its programs; UserError where it is not built."""
    for folder in ("build/bin", "build/bin/Release"):
        for suffix in ("", ".exe"):
            program = bitnet_path / folder / f"{name}{suffix}"
            if program.is_file():
                return program.absolute()
    raise UserError(
        f"bitnet_path: {name} is not built there",
        bitnet_path / "build/bin" / name,
        "build it as extern/README.md says, or leave bitnet_path out",
    )


def server_command(
    bitnet_path: Path, model_path: Path, *, host: str, port: int, threads: int, context: int = 2048
) -> Sequence[str]:
    """What `run_inference_server.py -m … -t … -c … --host … --port …` runs."""
    return [
        *(str(built(bitnet_path, SERVER)), "-m", str(model_path), "-c", str(context), "-t", str(threads)),
        *("-n", "4096", "-ngl", "0", "--temp", "0.8", "--host", host, "--port", str(port), "-cb"),
    ]


def inference_command(
    bitnet_path: Path,
    model_path: Path,
    prompt: str,
    *,
    max_tokens: int,
    threads: int,
    temperature: float,
    context: int = 2048,
) -> Sequence[str]:
    """What `run_inference.py -m … -p … -n … -t … -c … -temp …` runs."""
    return [
        *(str(built(bitnet_path, CLI)), "-m", str(model_path), "-n", str(max_tokens), "-t", str(threads)),
        *("-p", prompt, "-ngl", "0", "-c", str(context), "--temp", str(temperature)),
    ]
