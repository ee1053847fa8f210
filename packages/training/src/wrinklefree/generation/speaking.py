"""Put into a stream what a model writes, and count how fast it came."""

import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from wrinklefree.decoding import Decoding
from wrinklefree.generation.generate import stream_ids
from wrinklefree.generation.opening import Decoder
from wrinklefree.generation.prefix import Prefix
from wrinklefree.generation.text import text_pieces


@dataclass(slots=True)
class Speaker:
    """Prints answers to stdout and adds up what they took."""

    decoder: Decoder
    decoding: Decoding
    stream: bool = True
    """Print text as it comes, not when all of it is there."""
    answer: str = ""
    """What was said last, as far as it came."""
    num_tokens: int = 0
    num_forwards: int = 0
    seconds: float = 0.0

    def say(
        self, prefix: Prefix, prompt: Sequence[int], *, ends: Collection[int], generator: torch.Generator
    ) -> None:
        """Print an answer and a newline, also when it is stopped."""
        started, forwards_before = time.perf_counter(), prefix.num_forwards
        self.answer = ""
        pieces = text_pieces(self.decoder.tokenizer, self._tokens(prefix, prompt, ends, generator))
        try:
            for piece in pieces if self.stream else ["".join(pieces)]:
                print(piece, end="", flush=True)
                self.answer += piece
        finally:
            self.seconds += time.perf_counter() - started
            self.num_forwards += prefix.num_forwards - forwards_before
            print(flush=True)

    def print_speed(self) -> None:
        """One line on stderr, if anything was said."""
        if self.num_tokens:
            print(
                f"{self.num_tokens} tokens in {self.seconds:.2f} s, "
                f"{self.num_tokens / self.seconds:.1f} tokens/s, "
                f"{self.num_tokens / self.num_forwards:.2f} tokens per forward",
                file=sys.stderr,
            )

    def _tokens(
        self, prefix: Prefix, prompt: Sequence[int], ends: Collection[int], generator: torch.Generator
    ) -> Iterator[list[int]]:
        for new in stream_ids(prefix, prompt, self.decoding, ends=ends, generator=generator):
            self.num_tokens += len(new)
            yield [token for token in new if token not in ends]
