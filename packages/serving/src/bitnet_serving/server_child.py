"""llama.cpp's HTTP server (xllamacpp) in a process of its own: a script that needs nothing else of ours.

One line of JSON comes in on stdin; `address=http://…` goes out on stdout, among what the engine says. The
process lives until it is told to end or its stdin closes, so it never outlives whoever started it.
"""

import json
import os
import resource
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ADDRESS = "address="
WARNINGS = 2
"""How much the engine says: what goes wrong."""
CACHED_PROMPTS_MIB = 512
"""Prompts kept beyond those in the slots; the engine's default would be 8 GiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What the child is told."""

    gguf_path: Path
    api_key: str
    """Whoever asks the engine directly must know it."""
    threads: int
    context: int
    """Tokens of one request, prompt and answer; the model's own length if that is smaller."""
    slots: int
    """Requests answered at the same time; others wait."""
    lora: Path | None = None

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), default=str)


def main() -> None:
    """Serve until told to end."""
    # What crashes says so in one line of its parent, and leaves no core file behind.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    settings = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    server = _serve(settings)
    print(f"{ADDRESS}{server.listening_address}", flush=True)
    threading.Event().wait()


def _serve(settings: dict[str, Any]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["gguf_path"]
    if settings["lora"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(settings["lora"])]
    params.model_alias = {Path(settings["gguf_path"]).name}
    params.port = 0  # any that is free
    params.api_keys = [settings["api_key"]]
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    params.n_parallel = settings["slots"]
    params.n_ctx = settings["context"] * settings["slots"]
    params.fit_params = False
    params.cache_ram_mib = CACHED_PROMPTS_MIB
    params.ui = False
    params.verbosity = WARNINGS
    return xllamacpp.Server(params)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        # Not through the interpreter's end, which would wait for threads of the engine.
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)
