"""A teacher behind vLLM's interface tells what the model tells here, or one line tells what is wrong.

The server is a small model behind `http.server`. Its answers have the shape of `prompt_logprobs`: null,
then for each token of the prompt that token first, and the k best by rank where they are others.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bitnet_arch.testing import tiny_llama
from data_handler import Batch
from data_handler.demo import TOKENIZER_DIR
from durable import UserError
from wrinklefree.config import load_config
from wrinklefree.config.schema import TeacherBackend, TeacherConfig
from wrinklefree.objectives import LogitsDistillationObjective, Needs
from wrinklefree.objectives.factory import KINDS, Kind
from wrinklefree.run import run
from wrinklefree.runs import read_metrics
from wrinklefree.teachers.base import TopK
from wrinklefree.teachers.vllm import VLLMTeacher, open_vllm

NAME = "served/tiny"
Fault = Callable[["Handler"], bool]
"""Answers a request wrongly, or gives False to have it answered."""


class Server(ThreadingHTTPServer):
    """What was asked, and what goes wrong."""

    daemon_threads = True

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer = model, tokenizer
        self.max_logprobs, self.max_model_len = 10_000, 1000
        self.faults: list[Fault] = []
        """One for each of the next questions."""
        self.always: Fault | None = None
        self.prompts: list[list[int]] = []
        self.keys: list[str | None] = []
        self.num_connections = 0
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def completion(self, content: dict[str, Any]) -> tuple[int, Any]:
        prompt, k = content["prompt"], content["prompt_logprobs"]
        if content["model"] != NAME:
            return 404, {"error": {"message": f"The model `{content['model']}` does not exist."}}
        if max(prompt) >= self.model.config.vocab_size:
            return 400, {"error": {"message": f"Token id {max(prompt)} is out of vocabulary"}}
        if k > self.max_logprobs:
            asked = f"Requested prompt logprobs of {k}, which is greater than max allowed: "
            return 400, {"error": {"message": f"{asked}{self.max_logprobs}"}}
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([prompt])).logits[0]
        rows = torch.log_softmax(logits.float(), dim=-1)
        entries = [self.entry(row, token, k) for row, token in zip(rows, prompt[1:], strict=False)]
        choice = {"index": 0, "text": "?", "logprobs": None, "prompt_logprobs": [None, *entries]}
        return 200, {"id": "cmpl-1", "object": "text_completion", "model": NAME, "choices": [choice]}

    def entry(self, log_probs_V: Tensor, token: int, k: int) -> dict[str, Any]:
        order, values = log_probs_V.argsort(descending=True).tolist(), log_probs_V.tolist()
        rank = {each: place for place, each in enumerate(order, start=1)}
        listed = [token, *(each for each in order[:k] if each != token)]
        return {
            str(each): {
                "logprob": max(-9999.0, values[each]),
                "rank": rank[each],
                "decoded_token": self.tokenizer.decode([each]) if self.tokenizer else None,
            }
            for each in listed
        }


class Handler(BaseHTTPRequestHandler):
    """Keeps connections, as vLLM does."""

    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.num_connections += 1

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self.server.keys.append(self.headers["Authorization"])
        card = {"id": NAME, "object": "model", "max_model_len": self.server.max_model_len}
        self.say(200, json.dumps({"object": "list", "data": [card]}).encode())

    def do_POST(self) -> None:
        assert self.path == "/v1/completions"
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.prompts.append(content["prompt"])
        fault = self.server.faults.pop(0) if self.server.faults else self.server.always
        if fault is not None and fault(self):
            return
        status, answer = self.server.completion(content)
        self.say(status, json.dumps(answer).encode())

    def say(self, status: int, body: bytes, *, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        if length not in (None, len(body)):
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Server]:
    server = Server(model.eval(), tokenizer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


VOCAB_SIZE = 512
LENGTHS = ((25, 15), (11, 1, 28))
"""Of the documents of each sample; one has a single token, which nothing follows."""


def packed_batch() -> Batch:
    input_ids = torch.randint(0, VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(3))
    document_ids = torch.stack(
        [torch.repeat_interleave(torch.arange(len(each)), torch.tensor(each)) for each in LENGTHS]
    )
    position_ids = torch.stack([torch.cat([torch.arange(size) for size in each]) for each in LENGTHS])
    return Batch(
        input_ids=input_ids,
        labels=input_ids.masked_fill(position_ids == 0, -100),
        position_ids=position_ids,
        document_ids=document_ids,
        source_id=torch.zeros(2, dtype=torch.int64),
        sample_id=torch.arange(2),
    )


def expected_log_probs(batch: Batch) -> Tensor:
    """[N, V]: of transformers, one document at a time, where a token of the same document follows."""
    model, rows = tiny_llama(seed=1).eval(), []
    for sample, lengths in enumerate(LENGTHS):
        for tokens in batch.input_ids[sample].split(lengths):
            with torch.no_grad():
                rows.append(model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1))
    return torch.cat(rows)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(tiny_llama(seed=1)) as server:
        yield server


def opened(server: Server, tokenizer: Any = None, **options: Any) -> VLLMTeacher:
    usual: dict[str, Any] = {"base_url": server.url, "timeout_seconds": 20.0}
    config = TeacherConfig(backend=TeacherBackend.vllm, **(usual | options))
    return open_vllm(config, vocab_size=VOCAB_SIZE, excluded=None, tokenizer=tokenizer, length=40)


def told(teacher: VLLMTeacher, batch: Batch) -> TopK:
    """Of all tokens that have a label."""
    places = (batch.labels[:, 1:] != -100).flatten().nonzero().squeeze(1)
    before = places + places // 39  # of 39 places, each sample has 40 tokens
    known = teacher.states(batch, Needs(teacher_logits=True)).next_tokens(before)(slice(None))
    assert isinstance(known, TopK)
    return known


@pytest.mark.parametrize("k", [VOCAB_SIZE, 7])
def test_the_server_says_of_each_token_what_the_model_says_before_it(server: Server, k: int) -> None:
    batch = packed_batch()
    expected = expected_log_probs(batch).topk(k)

    known = told(opened(server, top_k=k), batch)

    # The model's own arithmetic; JSON keeps every digit. Ties may come in another order.
    torch.testing.assert_close(known.log_probs, expected.values, rtol=0, atol=1e-6)
    at_ids = expected_log_probs(batch).gather(1, known.ids)
    torch.testing.assert_close(known.log_probs, at_ids, rtol=0, atol=1e-6)
    documents = [len(prompt) for prompt in server.prompts[1:]]
    assert sorted(documents) == sorted(size for sizes in LENGTHS for size in sizes if size > 1)


def test_what_follows_a_document_is_not_a_number(server: Server) -> None:
    states = opened(server, top_k=3).states(packed_batch(), Needs(teacher_logits=True))

    known = states.next_tokens(torch.tensor([23, 24, 39, 40 + 11]))(slice(None))

    assert isinstance(known, TopK)
    assert known.log_probs.isnan().all(1).tolist() == [False, True, True, True]


def test_an_excluded_token_has_no_probability(server: Server) -> None:
    batch, teacher = packed_batch(), opened(server, top_k=5)
    first = int(expected_log_probs(batch)[0].argmax())
    teacher.excluded = first
    logits = expected_log_probs(batch)
    logits[:, first] = -torch.inf
    expected = logits.log_softmax(-1).topk(5).values[0]

    known = told(teacher, batch)

    assert first not in known.ids
    torch.testing.assert_close(known.log_probs[0], expected, rtol=0, atol=1e-6)


def test_connections_and_the_key_are_kept(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_OF_THE_SERVER", "s3cret-of-the-server")

    teacher = opened(server, api_key_env="KEY_OF_THE_SERVER", base_url=f"{server.url}/v1/")
    for _ in range(4):
        told(teacher, packed_batch())

    assert server.keys == ["Bearer s3cret-of-the-server"]
    assert len(server.prompts) == 1 + 4 * 4
    assert server.num_connections <= 5


def hangs(handler: Handler) -> bool:
    handler.server.released.wait(5)
    handler.close_connection = True
    return True


def breaks(handler: Handler) -> bool:
    handler.say(500, b'{"error": {"message": "EngineCore died"}}')
    return True


def cuts_json(handler: Handler) -> bool:
    handler.say(200, b'{"choices": [{"prompt_logprobs": [null, {"7": {"logpr')
    return True


def cuts_body(handler: Handler) -> bool:
    handler.say(200, b'{"choices"', length=1000)
    return True


def hangs_up(handler: Handler) -> bool:
    handler.close_connection = True
    return True


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (hangs, "nothing for 0.12 seconds|no answer for 0 seconds"),
        (breaks, "HTTP status 500: .*EngineCore died"),
        (cuts_json, "no JSON"),
        (cuts_body, "990 bytes before"),
        (hangs_up, "RemoteDisconnected"),
    ],
)
def test_a_fault_is_tried_three_times_and_then_one_line(fault: Any, said: str, server: Server) -> None:
    batch, teacher = packed_batch(), opened(server, top_k=4)
    expected = told(teacher, batch)
    teacher.server.timeout_seconds = 5.0
    teacher.server.close()  # a connection keeps the limit that it began with
    server.prompts.clear()

    server.faults = [fault] if fault is hangs else [fault, fault]  # the first takes its time
    assert torch.equal(teacher.document(batch.input_ids[0, :25].tolist())[1], expected.log_probs[:24])
    assert len(server.prompts) == (2 if fault is hangs else 3)
    server.prompts.clear()
    teacher.server.close()
    server.always, teacher.server.timeout_seconds = fault, 0.4 if fault is hangs else 2.0
    with pytest.raises(UserError, match=said) as caught:
        teacher.document([1, 2, 3])

    assert caught.value.exit_code == 4
    assert f"{server.url}/v1/completions" in str(caught.value)
    assert len(server.prompts) == 3 or fault is hangs


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"choices": [{"text": "?"}]}, "without prompt_logprobs"),
        ([], "without prompt_logprobs"),
        ({"choices": [{"prompt_logprobs": [None]}]}, "1 entries for 3 tokens"),
        ({"choices": [{"prompt_logprobs": [None, {"9": {}}, {"3": {}}]}]}, "nothing of token 2"),
        ({"choices": [{"prompt_logprobs": [None, {"2": {}}, {"3": {}}]}]}, "KeyError"),
        (
            {"choices": [{"prompt_logprobs": [None, *({i: {"rank": 1, "logprob": -1}} for i in "23")]}]},
            "1 of 4 most probable tokens",
        ),
    ],
)
def test_an_answer_of_another_kind_is_not_asked_for_again(answer: Any, said: str, server: Server) -> None:
    teacher = opened(server, top_k=4)
    server.prompts.clear()

    def answers(handler: Handler) -> bool:
        handler.say(200, json.dumps(answer).encode())
        return True

    server.always = answers
    with pytest.raises(UserError, match=said) as caught:
        teacher.document([1, 2, 3])

    assert caught.value.exit_code == 4
    assert len(server.prompts) == 1


def test_a_server_that_may_not_tell_as_much_says_so(server: Server) -> None:
    server.max_logprobs = 20

    with pytest.raises(UserError, match=r"logprobs of 64.*max allowed: 20.*--max-logprobs") as caught:
        told(opened(server), packed_batch())

    assert caught.value.exit_code == 4


def test_another_vocabulary_is_refused_before_anything_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = (AutoTokenizer.from_pretrained(TOKENIZER_DIR) for _ in range(2))
    usual = other.decode
    monkeypatch.setattr(other, "decode", lambda ids: "elsewhere" if ids[0] >= 400 else usual(ids))

    with serving(tiny_llama(), own) as server:
        opened(server, own)
    with (
        serving(tiny_llama(), other) as server,
        pytest.raises(UserError, match="'elsewhere' there") as caught,
    ):
        opened(server, own)
    assert caught.value.exit_code == 4
    assert str(caught.value.found).startswith("token 4")
    smaller, larger = tiny_llama(vocab_size=VOCAB_SIZE - 12), tiny_llama(vocab_size=VOCAB_SIZE + 600)
    with serving(smaller) as server, pytest.raises(UserError, match="511 is out of vocabulary") as caught:
        opened(server)
    assert caught.value.exit_code == 4
    with serving(larger) as server, pytest.raises(UserError, match=r"\d+, the student has 512") as caught:
        told(opened(server, top_k=40), packed_batch())
    assert caught.value.exit_code == 4


def test_a_model_or_a_length_that_is_not_served_is_refused(server: Server) -> None:
    with pytest.raises(UserError, match=r"model: is not served at .*found another\).*served/tiny") as caught:
        opened(server, model="another")
    assert caught.value.exit_code == 4
    server.max_model_len = 40
    with pytest.raises(UserError, match=r"max_model_len 40 for 40 tokens and one more.*41") as caught:
        opened(server)
    assert caught.value.exit_code == 4


def test_a_key_that_is_not_there_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)

    with pytest.raises(UserError, match=r"api_key_env: this variable is not set \(found NOT_SET\)"):
        opened(server, api_key_env="NOT_SET")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["backend=vllm"], "base_url: is needed"),
        (["backend=vllm", "base_url=localhost:8000"], "is no address"),
        (["backend=vllm", "base_url='http://me:hunter2@host:1'"], "holds more than an address"),
        (["backend=vllm", "base_url='http://host:1'", "pretrained_name=x"], "pretrained_name: is for a"),
        (["base_url='http://host:1'"], "names a server, and the teacher runs here"),
        (["backend=vlm"], "vllm"),
        (["top_k=0"], "top_k: out of range"),
        (["timeout_seconds=0"], "timeout_seconds: out of range"),
    ],
)
def test_a_configuration_that_does_not_hold_is_one_line(given: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load_config(["model=tiny_llama", *(f"training.teacher.{each}" for each in given)])

    assert caught.value.exit_code == 2
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("which", ["backend=vllm", "cache=somewhere"])
def test_who_looks_inside_needs_a_teacher_that_runs_here(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Inside(LogitsDistillationObjective):
        def needs(self) -> Needs:
            return Needs(hidden_states=True)

    kind = KINDS["logits_distill"]
    monkeypatch.setitem(KINDS, "logits_distill", Kind(kind.config, Inside))
    server = ["training.teacher.base_url='http://host:1'"] if "vllm" in which else []

    wanted = ["training=base", "training.objectives.logits_distill.weight=1"]
    with pytest.raises(UserError, match=rf"logits_distill: needs hidden states.*{which}") as caught:
        load_config(["model=tiny_llama", *wanted, f"training.teacher.{which}", *server])

    assert caught.value.exit_code == 2


def test_a_run_learns_from_a_server(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_DIR)
    small = [
        "model=tiny_llama",
        "training=base",
        "training.objectives.logits_distill.weight=1",
        "data=demo",
        "training.max_seq_length=32",
        "training.batch_size=2",
        "training.gradient_accumulation_steps=1",
        "training.max_steps=1",
        "training.validation.num_batches=0",
    ]
    online = run(load_config([*small, f"output_dir={tmp_path / 'online'}"]))

    with serving(tiny_llama(), tokenizer) as server:
        there = ["training.teacher.backend=vllm", f"training.teacher.base_url={server.url}"]
        everything = [*there, f"training.teacher.top_k={VOCAB_SIZE}", "training.teacher.model=" + NAME]
        result = run(load_config([*small, *everything, f"output_dir={tmp_path / 'served'}"]))

    rows, expected = (read_metrics(each.directory / "metrics.jsonl") for each in (result, online))
    # Two float32 roundings of numbers around 6. After a step, ternary weights may differ by a whole code.
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], abs=2e-6)
    assert all(row["teacher_seconds"] > 0 for row in rows)
