"""The engine's own process: a file is loaded once, then each line on stdin is answered by lines on stdout.

    ─► {"ask": "tokenize", "text": "…", "add_special": false}          ─► {"tokens": […]}
    ─► {"ask": "next_log_probs", "ids": […], "positions": […], …}      ─► {"ids": […], "log_probs": […]} each
    ─► {"ask": "complete", "prompt": […], "num_tokens": 8}             ─► {"tokens": […], "timings": {…}}

Run as a script and never imported: it stands on the standard library and xllamacpp alone, so that it starts
at once. What the engine says goes to stderr, which is a log. The process ends when stdin does.
"""

import http.client
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

FORCED_TOKEN_BIAS = 1e4
LOG_LEVEL_ERRORS = 1


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    engine = LoadedFile(json.loads(sys.argv[1]))
    _answer(answers, {"ready": True})
    while True:
        for answer in engine.answers(requests.get()):
            _answer(answers, answer)


def _read_requests(requests: queue.Queue[dict[str, Any]]) -> None:
    """Whoever asked is gone when stdin ends, in the middle of an answer too."""
    for line in sys.stdin:
        requests.put(json.loads(line))
    os._exit(0)


def _answer(answers: Any, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


class LoadedFile:
    """A GGUF file in the engine."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = settings["path"]
        params.n_ctx = settings["context"]
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.warmup = params.fit_params = params.ui = False
        params.verbosity = LOG_LEVEL_ERRORS
        # Prompts are kept in the slot alone; a window that forgets could not go back by one token.
        params.n_ctx_checkpoints = params.cache_ram_mib = 0
        params.swa_full = True
        if settings["precise"]:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if settings["lora"]:
            adapter = xllamacpp.CommonAdapterLoraInfo()
            adapter.path, adapter.scale = settings["lora"], 1.0
            params.lora_adapters = [adapter]
        self._server = xllamacpp.Server(params)
        self._host = self._server.listening_address.removeprefix("http://")
        self._harmless: int | None = None

    def answers(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        match request["ask"]:
            case "tokenize":
                yield {"tokens": self._tokens(request["text"], add_special=request["add_special"])}
            case "next_log_probs":
                for position in request["positions"]:
                    yield self._next_log_probs(request["ids"][: position + 1], request["top_k"])
            case "complete":
                yield self._complete(request)

    def _tokens(self, text: str, *, add_special: bool) -> list[int]:
        body = {"content": text, "add_special": add_special, "parse_special": True}
        tokens: list[int] = self._post("/tokenize", body)["tokens"]
        return tokens

    def _next_log_probs(self, ids: list[int], top_k: int) -> dict[str, Any]:
        if self._harmless is None:
            self._harmless = self._harmless_token()
        answer = self._post(
            "/completion",
            {
                "prompt": ids,
                "n_predict": 1,
                "n_probs": top_k,
                "temperature": 0,
                "cache_prompt": True,
                # Log-probabilities are those before any bias. The engine returns none at all where it has
                # generated half of a character, so it is told what to generate.
                "logit_bias": [[self._harmless, FORCED_TOKEN_BIAS]],
            },
        )
        top = [
            entry for token in answer.get("completion_probabilities", ()) for entry in token["top_logprobs"]
        ]
        return {"ids": [entry["id"] for entry in top], "log_probs": [entry["logprob"] for entry in top]}

    def _harmless_token(self) -> int:
        """One that is a whole character."""
        for text in ("a", "e", ".", "0"):
            tokens = self._tokens(text, add_special=False)
            if tokens and self._post("/detokenize", {"tokens": tokens[-1:]})["content"].strip() == text:
                return tokens[-1]
        return 0

    def _complete(self, request: dict[str, Any]) -> dict[str, Any]:
        body = {
            "prompt": request["prompt"],
            "n_predict": request["num_tokens"],
            "temperature": 0,
            "ignore_eos": request["ignore_eos"],
            "cache_prompt": False,
            "return_tokens": True,
        }
        answer = self._post("/completion", body)
        return {"tokens": answer["tokens"], "timings": answer["timings"]}

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        connection = http.client.HTTPConnection(self._host)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        if "error" in answer:
            raise RuntimeError(answer["error"].get("message", "no reason given"))
        return answer


def _wait_for_log() -> None:
    """The engine logs its reasons from a thread of its own: until nothing has come for a second."""
    size = -1
    while (grown := os.fstat(sys.stderr.fileno()).st_size) != size:
        size = grown
        time.sleep(1)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        _wait_for_log()
        # Not through the interpreter's end: the engine's threads would be asked to end first, and may hang.
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)
