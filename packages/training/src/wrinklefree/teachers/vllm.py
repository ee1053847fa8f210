"""A teacher behind vLLM's OpenAI interface: the most probable tokens at each place of a prompt.

    POST /v1/completions {"prompt": [ids], "max_tokens": 1, "prompt_logprobs": k, …}
    choices[0].prompt_logprobs = [null, {"ID": {"logprob": …, "rank": …, "decoded_token": …}, …}, …]

Entry i is about token i, given those before it: it belongs to the hidden state of token i - 1. It holds the k
best and, when it is none of them, the token of the prompt itself, by its rank. Each document of a packed
sample is a prompt of its own; what would follow its last token is not asked for, no label is there.

Shapes: B samples, T tokens, K most probable tokens.
"""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from data_handler import Batch
from durable import ExitCode, UserError
from wrinklefree.config.schema import TeacherConfig
from wrinklefree.objectives.base import Needs
from wrinklefree.teachers.base import Teacher
from wrinklefree.teachers.http import JsonServer
from wrinklefree.teachers.sparse import SparseTeacherStates, UndecidedTeacher

KEY = "training.teacher.base_url"
COMPLETIONS = "/v1/completions"
NUM_AT_ONCE = 8
"""Questions under way at once."""
MINUS_INFINITY = -9999.0
"""JSON has no infinity: vLLM writes this."""
LARGEST_TOKEN = 1024
"""Bytes of an answer for each token of an entry, at most."""
NUM_PROBED = 48
"""Tokens whose text is compared before anything is learnt."""


class Tokenizer(Protocol):
    """What tells the text of a token."""

    def __len__(self) -> int: ...

    def decode(self, token_ids: list[int], /) -> Any: ...


class VLLMTeacher(Teacher):
    """Asks for every document of every batch."""

    knows_inside = False

    def __init__(
        self, server: JsonServer, *, model: str, k: int, vocab_size: int, excluded: int | None = None
    ) -> None:
        """`excluded` is a token of the server's vocabulary that gets no probability."""
        self.server = server
        self.model = model
        self.k = k
        self.vocab_size = vocab_size
        self.excluded = excluded
        self._threads = ThreadPoolExecutor(NUM_AT_ONCE, thread_name_prefix="teacher")

    def answer(self, batch: Batch, needs: Needs, *, excluded: int | None) -> SparseTeacherStates:
        assert not needs.needs_inside, "the configuration was checked"
        ids_BT, documents_BT = batch.input_ids.cpu(), batch.document_ids.cpu()
        shape = (*ids_BT.shape, self.k)
        ids_BTK = torch.arange(self.k).expand(shape).clone()
        log_probs_BTK = torch.full(shape, torch.nan)
        places = [
            (sample, start, stop)
            for sample, documents in enumerate(documents_BT)
            for start, stop in spans(documents)
            if stop - start > 1
        ]
        prompts = [ids_BT[sample, start:stop].tolist() for sample, start, stop in places]
        for (sample, start, stop), (ids, log_probs) in zip(
            places, self._threads.map(self.document, prompts), strict=True
        ):
            ids_BTK[sample, start : stop - 1] = ids
            log_probs_BTK[sample, start : stop - 1] = log_probs
        states = SparseTeacherStates(ids=ids_BTK, log_probs=log_probs_BTK, vocab_size=self.vocab_size)
        return states.to(batch.labels.device)

    def document(self, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """[n - 1, K] each: what may follow each token of a document but the last."""
        found = [self._best(entry) for entry in self._entries(tokens, self._asked)[1:]]
        ids, log_probs = zip(*found, strict=True)
        return torch.tensor(ids), torch.tensor(log_probs, dtype=torch.float32)

    def check(self, tokenizer: Tokenizer | None, *, longest: int) -> None:
        """Does the server mean the same by a token? UserError (exit code 4) names the first that differs.

        Tokens from all over the vocabulary are a prompt, of at most so many.
        """
        size = min(self.vocab_size, len(tokenizer)) if tokenizer is not None else self.vocab_size
        number = max(2, min(NUM_PROBED, longest - 1))
        wanted = sorted({place * (size - 1) // (number - 1) for place in range(number)})
        entries = self._entries([wanted[0], *wanted], 1)[1:]
        for token, entry in zip(wanted, entries, strict=True):
            theirs = entry[str(token)].get("decoded_token")
            ours = None if tokenizer is None else str(tokenizer.decode([token]))
            if ours is not None and isinstance(theirs, str) and _differ(ours, theirs):
                raise UserError(
                    f"{KEY}: {self.server.address} has another tokenizer than the student",
                    f"token {token} is {theirs!r} there and {ours!r} here, of {size:,} tokens",
                    "serve a model with the student's tokenizer",
                    ExitCode.BAD_DATA,
                )

    def rehearsing(self) -> Teacher:
        return UndecidedTeacher(self.vocab_size, self.k)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self.server.close()

    @property
    def _asked(self) -> int:
        """One more where one may have to go."""
        return self.k + (self.excluded is not None)

    def _entries(self, tokens: list[int], k: int) -> list[Any]:
        """`prompt_logprobs` of a prompt, one for each token; the first is nobody's."""
        content = {
            "model": self.model,
            "prompt": tokens,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": k,
            "add_special_tokens": False,
        }
        largest = 2**20 + len(tokens) * (k + 1) * LARGEST_TOKEN
        answer = self.server.ask(COMPLETIONS, content, largest=largest)
        try:
            entries = answer["choices"][0]["prompt_logprobs"]
        except (KeyError, IndexError, TypeError):
            entries = None
        if not isinstance(entries, list):
            raise self.server.refused(COMPLETIONS, "an answer without prompt_logprobs", "serve it with vLLM")
        if len(entries) != len(tokens):
            raise self.server.refused(COMPLETIONS, f"{len(entries)} entries for {len(tokens)} tokens")
        for token, entry in zip(tokens[1:], entries[1:], strict=True):
            # Of another prompt, or of one with a token put in front?
            if not isinstance(entry, Mapping) or not isinstance(entry.get(str(token)), Mapping):
                raise self.server.refused(COMPLETIONS, f"nothing of token {token} where it stands")
        return entries

    def _best(self, entry: Mapping[str, Any]) -> tuple[list[int], list[float]]:
        """The k most probable tokens of an entry, without the one that is excluded."""
        try:
            ranked = sorted(
                (int(each["rank"]), int(token), float(each["logprob"])) for token, each in entry.items()
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self.server.refused(COMPLETIONS, f"{type(error).__name__}: {error}") from None
        out = sum(math.exp(value) for _, token, value in ranked if token == self.excluded)
        rest = math.log1p(-out) if out < 1 else 0.0
        ids, log_probs = [], []
        for _, token, value in [each for each in ranked if each[1] != self.excluded][: self.k]:
            if not 0 <= token < self.vocab_size:
                raise UserError(
                    f"{KEY}: {self.server.address} has another vocabulary than the student",
                    f"token {token}, the student has {self.vocab_size:,}",
                    "serve a model with the student's tokenizer",
                    ExitCode.BAD_DATA,
                )
            if math.isnan(value) or value > 1e-3:
                raise self.server.refused(COMPLETIONS, f"log probability {value}")
            ids.append(token)
            log_probs.append(-math.inf if value <= MINUS_INFINITY else min(0.0, value - rest))
        if len(ids) < self.k:
            raise self.server.refused(COMPLETIONS, f"{len(ids)} of {self.k} most probable tokens")
        return ids, log_probs


def open_vllm(
    config: TeacherConfig, *, vocab_size: int, excluded: int | None, tokenizer: Tokenizer | None, length: int
) -> VLLMTeacher:
    """Reach the server, and see that it has the student's tokenizer and room for blocks of this length."""
    server = open_server(config)
    name, longest = served_model(server, config.model)
    if longest is not None and longest <= length:
        raise server.refused(
            "/v1/models",
            f"max_model_len {longest:,} for {length:,} tokens and one more",
            f"serve it with --max-model-len {length + 1}, or lower training.max_seq_length",
        )
    teacher = VLLMTeacher(
        server, model=name, k=min(config.top_k, vocab_size), vocab_size=vocab_size, excluded=excluded
    )
    teacher.check(tokenizer, longest=length)
    return teacher


def open_server(config: TeacherConfig) -> JsonServer:
    """The address without /v1, which both ways of writing it lead to."""
    assert config.base_url is not None, "the configuration was checked"
    secret = None
    if config.api_key_env is not None:
        secret = os.environ.get(config.api_key_env)
        if not secret:
            raise UserError(
                "training.teacher.api_key_env: this variable is not set",
                config.api_key_env,
                "set it to the server's key, or leave out api_key_env",
            )
    return JsonServer(
        config.base_url.rstrip("/").removesuffix("/v1"),
        timeout_seconds=config.timeout_seconds,
        secret=secret,
        key=KEY,
    )


def served_model(server: JsonServer, name: str | None) -> tuple[str, int | None]:
    """The name of the model that is asked, and how many tokens it takes, where the server says so."""
    path = "/v1/models"
    content = server.ask(path)
    listed = content.get("data") if isinstance(content, Mapping) else None
    models = [each for each in listed or () if isinstance(each, Mapping) and isinstance(each.get("id"), str)]
    chosen = next((each for each in models if name in (None, each["id"])), None)
    if chosen is None:
        raise UserError(
            f"training.teacher.model: is not served at {server.address}",
            name,
            exit_code=ExitCode.BAD_DATA,
            choices=[each["id"] for each in models],
        )
    longest = chosen.get("max_model_len")
    return str(chosen["id"]), longest if isinstance(longest, int) else None


def spans(documents_T: Tensor) -> Sequence[tuple[int, int]]:
    """Where each document of a sample begins and ends."""
    lengths = torch.unique_consecutive(documents_T, return_counts=True)[1].tolist()
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [(end - size, end) for end, size in zip(ends, lengths, strict=True)]


def _differ(ours: str, theirs: str) -> bool:
    """Parts of characters have no text of their own, and spaces in front may be lost."""
    ours, theirs = ours.strip(), theirs.strip()
    return bool(ours and theirs) and "�" not in ours + theirs and ours != theirs
