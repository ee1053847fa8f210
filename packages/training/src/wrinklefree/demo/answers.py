"""Ask a trained decoder questions it has never seen, and count what it gets right to the last character."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from data_handler.sorting import ANSWER_LENGTH, HELD_OUT, PROMPT_LENGTH, decode, sorting_batch
from durable import ExitCode, UserError


@dataclass(frozen=True, slots=True)
class Answers:
    """Questions with the answers that a model gave."""

    token_ids: Tensor
    """[B, T]: question and given answer."""
    is_exact: list[bool]

    @property
    def num_exact(self) -> int:
        return sum(self.is_exact)

    def texts(self) -> list[str]:
        return [decode(row).rstrip("\n") for row in self.token_ids.tolist()]


@torch.no_grad()
def answer_fresh_questions(model: PreTrainedModel, *, seed: int, count: int) -> Answers:
    """Greedy answers to the first `count` held-out questions."""
    expected = sorting_batch(seed, HELD_OUT, count).input_ids
    token_ids = expected[:, :PROMPT_LENGTH]
    for _ in range(ANSWER_LENGTH):
        logits = model(input_ids=token_ids, use_cache=False).logits[:, -1]
        token_ids = torch.cat([token_ids, logits.argmax(-1, keepdim=True)], dim=-1)
    return Answers(token_ids, (token_ids == expected).all(-1).tolist())


def require(answers: Answers, *, at_least: int) -> None:
    """Fail loudly when too few answers are right."""
    if answers.num_exact < at_least:
        raise UserError(
            "demo: the decoder did not learn to sort",
            found=f"{answers.num_exact} of {len(answers.is_exact)} fresh samples exact, {at_least} needed",
            fix="this is no fault of yours: please report it with what 'wrinklefree doctor' prints",
            exit_code=ExitCode.DIVERGED,
        )
