"""`wrinklefree demo`: its parts in seconds. The whole of it is run as the first line of README.md."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bitnet_arch import BitLinear, load_bitnet
from data_handler import Shards
from data_handler.sorting import decode
from durable import UserError
from wrinklefree.commands.demo import demo
from wrinklefree.demo.answers import Answers, answer_fresh_questions, require
from wrinklefree.demo.block_speed import compare_step_speed
from wrinklefree.demo.recipe import Recipe, learn, write_task
from wrinklefree.demo.stock import read_with_stock_transformers
from wrinklefree.runs import read_metrics

SHORT = Recipe(steps=3, batch_size=4, hidden_size=24, intermediate_size=40, num_heads=2)


class Ended(Protocol):
    """What the fixture `wrinklefree` gives back."""

    exit_code: int
    out: str
    err: str


Run = Callable[..., Ended]


def learned(recipe: Recipe, directory: Path) -> tuple[PreTrainedModel, list[float]]:
    """The decoder that a run leaves behind, and the loss of each step."""
    write_task(recipe, directory)
    run_directory = learn(recipe, directory).directory
    rows = read_metrics(run_directory / "metrics.jsonl")
    return load_bitnet(run_directory / "checkpoints" / "final"), [row["loss"] for row in rows]


def test_the_decoder_is_ternary_everywhere_but_in_its_embedding(tmp_path: Path) -> None:
    model, _ = learned(SHORT, tmp_path)

    assert sum(isinstance(module, BitLinear) for module in model.modules()) == 7 * SHORT.num_layers
    assert sum(name.endswith("input_norm.weight") for name in model.state_dict()) == 2 * SHORT.num_layers


def test_the_same_seed_gives_the_same_losses_and_weights(tmp_path: Path) -> None:
    (one, losses), (other, again) = (learned(SHORT, tmp_path / name) for name in ("one", "other"))

    assert losses == again
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_every_question_is_read_whole_and_once_with_a_loss_on_its_answer(tmp_path: Path) -> None:
    write_task(SHORT, tmp_path)
    learn(SHORT, tmp_path)
    shards = Shards.open(tmp_path / "data/questions/train")

    texts = [decode(tokens.tolist()[:-1]) for tokens, _ in shards.documents()]
    wanted = [decode(tokens[loss == 1].tolist()) for tokens, loss in shards.documents() if loss is not None]

    questions = [text.partition(">")[0] for text in texts]
    assert len(set(questions)) == SHORT.steps * SHORT.batch_size
    assert {len(text) for text in texts} == {len("31415926>11234569\n")}
    assert wanted == ["".join(sorted(question)) + "\n" for question in questions]


def test_training_starts_at_the_entropy_of_a_guess_and_falls(tmp_path: Path) -> None:
    recipe = Recipe(steps=25, batch_size=32, hidden_size=48, intermediate_size=64, warmup_steps=5)

    _, losses = learned(recipe, tmp_path)

    # ln 13: twelve characters and an end, none of them known to be likelier.
    assert losses[0] == pytest.approx(2.565, abs=0.15)
    assert losses[-1] < 0.8 * losses[0]


def test_an_answer_is_exact_only_to_the_last_character() -> None:
    class Sorter:
        """Answers right, but for the last digit of every second question."""

        def __call__(self, *, input_ids: torch.Tensor, use_cache: bool) -> object:
            rows = []
            for number, row in enumerate(input_ids.tolist()):
                question, _, given = decode(row).partition(">")
                answer = "".join(sorted(question)) + "\n"
                wrong = number % 2 and len(given) == 7
                rows.append("0123456789>\n".index("0" if wrong else answer[len(given)]))
            logits = torch.nn.functional.one_hot(torch.tensor(rows), 12).float()[:, None]
            return type("Output", (), {"logits": logits})

    answers = answer_fresh_questions(Sorter(), seed=0, count=10)  # type: ignore[arg-type]

    assert answers.num_exact == 5
    assert answers.is_exact[:2] == [True, False]


def test_ninety_is_enough_and_eighty_nine_is_not() -> None:
    def with_right(count: int) -> Answers:
        return Answers(torch.zeros(100, 18, dtype=torch.long), [True] * count + [False] * (100 - count))

    require(with_right(90), at_least=90)
    with pytest.raises(UserError, match="89 of 100") as caught:
        require(with_right(89), at_least=90)
    assert caught.value.exit_code == 6


def test_a_decoder_that_did_not_learn_fails_loudly_and_is_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="did not learn") as caught:
        demo(keep=tmp_path / "kept", recipe=SHORT)

    assert caught.value.exit_code == 6
    assert list((tmp_path / "kept").glob("**/checkpoints/final/model.safetensors"))
    assert "0 of 100 sorted exactly" in capsys.readouterr().out


def test_the_ratio_compares_medians_of_alternating_steps() -> None:
    tiny = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )

    speed = compare_step_speed(tiny, batch_size=2, num_tokens=5, repetitions=3)

    assert len(speed.dense_seconds) == len(speed.ternary_seconds) == 3
    assert speed.ratio == sorted(speed.dense_seconds)[1] / sorted(speed.ternary_seconds)[1]


@pytest.mark.slow
def test_a_checkpoint_that_stock_transformers_cannot_read_is_one_line(tmp_path: Path) -> None:
    model = LlamaForCausalLM(SHORT.model_config())
    (tmp_path / "stock").mkdir()

    with pytest.raises(UserError, match="stock transformers cannot read it"):
        read_with_stock_transformers(tmp_path / "stock", model, torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.parametrize("target", ["file", "full"])
def test_a_place_to_keep_things_that_is_taken_is_refused_at_once(
    wrinklefree: Run, tmp_path: Path, target: str
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thing").write_text("mine")

    ended = wrinklefree("demo", "--keep", tmp_path / target)

    assert ended.exit_code == 2
    assert ended.out == ""
    assert ended.err.count("\n") == 1
