"""`wrinklefree generate` and `chat` on a .gguf file: what llama.cpp writes, token after token."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bitnet_serving.bench import context_length
from bitnet_serving.client import BitNetClient, Message, RefusedError
from bitnet_serving.engine_server import CONTEXT, EngineServer
from bitnet_serving.gguf_reader import GGUFFile, read_gguf
from durable import UserError, error_line
from wrinklefree.commands.asking import FORGOTTEN, next_question, text_of_stdin
from wrinklefree.decoding import USUAL_NEW_TOKENS, Decoding

TOO_LONG = "exceed_context_size_error"


def generate(name: str, *, prompts: Sequence[str], decoding: Decoding, stream: bool) -> None:
    """Print what follows each prompt; without one, what follows stdin."""
    texts = prompts or [text_of_stdin()]
    with _engine(read_gguf(name), decoding) as engine:
        speaker = _Speaker(engine.client(), decoding, stream)
        try:
            for number, text in enumerate(texts):
                if number:
                    print()
                try:
                    speaker.say("/completion", prompt=text)
                except RefusedError as error:
                    raise _too_long(error) if error.kind == TOO_LONG else error from None
        finally:
            speaker.print_speed()


def chat(name: str, *, decoding: Decoding, stream: bool) -> None:
    """Answer lines of stdin until it ends or says /exit. Ctrl-C stops an answer, else the chat."""
    file = read_gguf(name)
    if "tokenizer.chat_template" not in file.metadata:
        raise UserError(f"{name}: its tokenizer has no chat template", fix="use 'wrinklefree generate'")
    history: list[Message] = []
    with _engine(file, decoding) as engine:
        speaker = _Speaker(engine.client(), decoding, stream)
        try:
            while (line := next_question()) is not None:
                history.append({"role": "user", "content": line})
                with contextlib.suppress(KeyboardInterrupt):
                    history = _answered(history, speaker)
                if history:
                    history.append({"role": "assistant", "content": speaker.answer})
        finally:
            speaker.print_speed()


def _answered(history: list[Message], speaker: "_Speaker") -> list[Message]:
    """The part of the history that has been answered: the oldest turns go where not all has room."""
    while True:
        try:
            speaker.say("/v1/chat/completions", messages=history)
        except RefusedError as error:
            if error.kind != TOO_LONG:
                raise
            if len(history) == 1:
                print(error_line(_too_long(error)), file=sys.stderr)
                return []
        else:
            return history
        print(FORGOTTEN, file=sys.stderr)
        history = history[2:]


def _too_long(error: RefusedError) -> UserError:
    return UserError("prompt: longer than the model's positions", error.found, "give a shorter one")


def _engine(file: GGUFFile, decoding: Decoding) -> EngineServer:
    if decoding.mode != "ar":
        raise UserError(
            "mode: an engine writes token after token",
            decoding.mode,
            "name a checkpoint, or leave --mode out",
        )
    return EngineServer(file.path, slots=1, context=min(context_length(file), CONTEXT))


@dataclass(slots=True)
class _Speaker:
    """Prints answers to stdout and adds up what they took."""

    client: BitNetClient
    decoding: Decoding
    stream: bool
    answer: str = ""
    num_tokens: int = 0
    seconds: float = 0.0

    def say(self, path: str, **request: Any) -> None:
        """Print an answer and a newline, also when it is stopped."""
        started = time.perf_counter()
        self.answer = ""
        pieces = self._pieces(path, request)
        try:
            for piece in pieces if self.stream else ["".join(pieces)]:
                print(piece, end="", flush=True)
                self.answer += piece
        except RefusedError:
            raise
        except BaseException:
            print(flush=True)
            raise
        print(flush=True)
        self.seconds += time.perf_counter() - started

    def print_speed(self) -> None:
        """One line on stderr, if anything was said."""
        if self.num_tokens:
            speed = self.num_tokens / self.seconds
            print(f"{self.num_tokens} tokens in {self.seconds:.2f} s, {speed:.1f} tokens/s", file=sys.stderr)

    def _pieces(self, path: str, request: dict[str, Any]) -> Iterator[str]:
        for event in self.client.events(path, request | self._options()):
            self.num_tokens += event.get("timings", {}).get("predicted_n", 0)
            texts = [choice["delta"].get("content") for choice in event.get("choices", ())]
            yield from filter(None, [event.get("content"), *texts])

    def _options(self) -> dict[str, Any]:
        """As this decoding goes in PyTorch: none of the other filters that the engine has by default."""
        decoding = self.decoding
        return {
            "max_tokens": decoding.max_new_tokens or USUAL_NEW_TOKENS,
            "n_predict": decoding.max_new_tokens or USUAL_NEW_TOKENS,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "seed": decoding.seed,
            "cache_prompt": decoding.prefix_cache,
        }
