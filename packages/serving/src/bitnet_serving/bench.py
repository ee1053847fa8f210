"""`wrinklefree bench`: how fast an engine runs a file here, and how near that is to what memory allows.

A token of decoding reads every weight once, so tokens a second × bytes a token over the bandwidth measured in
the same call says whether a file waits for memory (near 1) or for arithmetic.
"""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitnet_serving.engine_server import EngineServer, processors
from bitnet_serving.gguf_reader import GGUFFile, read_gguf
from durable import UserError

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 512, 64, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What was measured; rates are medians over the rounds."""

    file: str
    file_bytes: int
    threads: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    bytes_per_token: int
    """Weights that a token of decoding reads; keys and values come on top."""
    bandwidth_bytes_per_second: float
    """What as many threads read from memory, measured in the same call."""

    @property
    def share_of_bandwidth(self) -> float:
        """1 is a decoder that waits for memory alone."""
        return self.decode_tokens_per_second * self.bytes_per_token / self.bandwidth_bytes_per_second

    def to_json(self) -> str:
        """Every number, under its name."""
        return json.dumps({**asdict(self), "share_of_bandwidth": self.share_of_bandwidth}, indent=2)

    def __str__(self) -> str:
        rows = [
            ("file", f"{self.file}, {self.file_bytes / 1e6:.2f} MB"),
            ("threads", f"{self.threads}"),
            ("prefill", f"{self.prefill_tokens_per_second:.1f} tokens/s ({self.prompt_tokens} tokens)"),
            ("decode", f"{self.decode_tokens_per_second:.1f} tokens/s ({self.new_tokens} tokens)"),
            ("bytes per token", f"{self.bytes_per_token / 1e6:.2f} MB"),
            ("memory bandwidth", f"{self.bandwidth_bytes_per_second / 1e9:.1f} GB/s"),
            ("share of it", f"{self.share_of_bandwidth:.1%}"),
        ]
        return "\n".join(f"{name:<16}  {value}" for name, value in rows)


def bench(
    gguf_path: Path,
    *,
    threads: int | None = None,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    rounds: int = ROUNDS,
) -> Bench:
    """Time a file, alternating prefill and decoding."""
    from bitnet_serving.bandwidth import memory_bandwidth  # torch, and who asks for help has no use for it

    file = read_gguf(gguf_path)
    threads = threads or processors()
    longest = context_length(file)
    if max(prompt_tokens, new_tokens) >= longest:
        raise UserError(
            "bench: more tokens than the model has positions",
            f"{prompt_tokens} to read and {new_tokens} to write, the model has {longest}",
            f"give --prompt-tokens and --new-tokens below {longest}",
        )
    bandwidth = memory_bandwidth(threads=threads)
    prompt = _ordinary_tokens(file, prompt_tokens)
    context = max(prompt_tokens, new_tokens) + 8
    with EngineServer(gguf_path, threads=threads, slots=1, context=context) as engine:
        client = engine.client()

        def timings(prompt: list[int], num_new: int) -> dict[str, Any]:
            request = {"prompt": prompt, "n_predict": num_new, "ignore_eos": True, "temperature": 0}
            answer: dict[str, Any] = client.ask("/completion", request | {"cache_prompt": False})["timings"]
            return answer

        timings(prompt[:16], 2)  # the first request touches pages that no other has to
        prefill, decode = [], []
        for _ in range(rounds):
            prefill.append(timings(prompt, 1)["prompt_per_second"])
            decode.append(timings(prompt[:1], new_tokens)["predicted_per_second"])
    return Bench(
        file=gguf_path.name,
        file_bytes=gguf_path.stat().st_size,
        threads=threads,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill_tokens_per_second=statistics.median(prefill),
        decode_tokens_per_second=statistics.median(decode),
        bytes_per_token=bytes_per_token(file),
        bandwidth_bytes_per_second=bandwidth,
    )


def bytes_per_token(file: GGUFFile) -> int:
    """Of the weights read for one token: all but the embedding, unless that is the head, too.

    Of experts, as many as a token is given to.
    """
    is_tied = "output.weight" not in file.tensors
    experts, used = (_number(file, key, 1) for key in ("expert_count", "expert_used_count"))
    total = 0
    for name, tensor in file.tensors.items():
        if name == "token_embd.weight" and not is_tied:
            continue
        total += tensor.num_bytes * used // experts if "_exps." in name else tensor.num_bytes
    return total


def context_length(file: GGUFFile) -> int:
    """Positions that the model has."""
    return _number(file, "context_length", 2048)


def _number(file: GGUFFile, key: str, default: int) -> int:
    value = file.metadata.get(f"{file.metadata.get('general.architecture')}.{key}")
    return value if isinstance(value, int) and value > 0 else default


def _ordinary_tokens(file: GGUFFile, count: int) -> list[int]:
    """Ids that stand for text (type 1), in turn; what they say does not matter."""
    types = file.metadata.get("tokenizer.ggml.token_type")
    ordinary = [number for number, kind in enumerate(types) if kind == 1] if isinstance(types, list) else []
    ordinary = ordinary or [0]
    return [ordinary[number % len(ordinary)] for number in range(count)]
