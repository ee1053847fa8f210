"""`wrinklefree demo`: the whole way on a decoder small enough to train while one watches, offline.

    write a task ─► the trainer: convert, train, checkpoint ─► answer fresh questions
                                                                        │
              time a step ◄─ weigh ◄─ reload with stock transformers ◄─ save

Every number it prints is measured in this run. It ends with an error when the decoder did not learn, or does
not survive saving.
"""

import contextlib
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from bitnet_arch import load_bitnet, save_bitnet
from bitnet_serving import read_sizes
from data_handler.sorting import HELD_OUT
from durable import ExitCode, UserError
from wrinklefree.commands.convert import check_target
from wrinklefree.demo.answers import Answers, answer_fresh_questions, require
from wrinklefree.demo.block_speed import compare_step_speed
from wrinklefree.demo.recipe import SAMPLE_LENGTH, Recipe, learn, write_task
from wrinklefree.demo.stock import read_with_stock_transformers
from wrinklefree.runs import read_metrics
from wrinklefree.terminal import curve, megabytes, table
from wrinklefree.training.run_directory import FINAL

NUM_QUESTIONS = 100
NUM_RIGHT_NEEDED = 90
CPU_SECONDS_ALLOWED = 120


def demo(*, keep: Path | None, recipe: Recipe | None = None) -> None:
    """Run the demo; with `keep`, leave what it saves there."""
    recipe = recipe or Recipe()
    # One thread: the layers are too small to share out, and the numbers are the same wherever this CPU is.
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    with _directory(keep) as directory:
        model = _learn(recipe, directory)
        answers = _answer(model, recipe)
        _save(model, directory)
        _reload(model, answers, directory)
        _weigh(directory)
        _time(recipe)
        print(f"\n{f'kept {directory}' if keep else 'nothing kept (--keep DIR does)'}; {_cpu_seconds()}")


def _learn(recipe: Recipe, directory: Path) -> PreTrainedModel:
    print("A ternary decoder learns to sort eight digits: 31415926>11234569\n")
    write_task(recipe, directory)
    result = learn(recipe, directory)
    if result.exit_code:
        raise SystemExit(result.exit_code)  # somebody asked the run to stop
    losses = [row["loss"] for row in read_metrics(result.directory / "metrics.jsonl")]
    print("\nloss, every weight in {-1, 0, +1} from the first step on")
    print(curve(losses))
    return load_bitnet(result.directory / "checkpoints" / FINAL)


def _answer(model: PreTrainedModel, recipe: Recipe) -> Answers:
    answers = answer_fresh_questions(model, seed=recipe.seed, count=NUM_QUESTIONS)
    print(f"\nfresh questions, none of them among the {recipe.steps * recipe.batch_size:,} of the training")
    assert recipe.steps * recipe.batch_size <= HELD_OUT
    for text, is_exact in zip(answers.texts()[:3], answers.is_exact, strict=False):
        print(f"  {text}  {'exact' if is_exact else 'wrong'}")
    print(f"  {answers.num_exact} of {NUM_QUESTIONS} sorted exactly")
    require(answers, at_least=NUM_RIGHT_NEEDED)
    return answers


def _save(model: PreTrainedModel, directory: Path) -> None:
    save_bitnet(model, directory / "training", layout="training")
    save_bitnet(model, directory / "stock", layout="stock")
    save_bitnet(model, directory / "packed", layout="stock", packed=True)


def _reload(model: PreTrainedModel, answers: Answers, directory: Path) -> None:
    print("\nsaved and read back")
    again = load_bitnet(directory / "training")
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    if not same:
        raise UserError(
            f"{directory / 'training'}: read back other weights than were saved", exit_code=ExitCode.BAD_DATA
        )
    rows = [("training", "bitnet_arch", "every weight equal")]
    for layout in ("stock", "packed"):
        reading = read_with_stock_transformers(directory / layout, model, answers.token_ids)
        rows.append(
            (
                layout,
                reading.description,
                f"KL {reading.kl:.1e}, logits within {reading.largest_difference:.1e}",
            )
        )
    print(table(rows))


def _weigh(directory: Path) -> None:
    print("\nmodel.safetensors, measured")
    files = {
        "dense bf16": directory / "dense",
        "ternary, latent weights (to train on)": directory / "training",
        "ternary, two bits (to run)": directory / "packed",
    }
    sizes = {name: (path / "model.safetensors").stat().st_size for name, path in files.items()}
    dense = sizes["dense bf16"]
    print(table([(name, megabytes(size), f"{size / dense:.0%} of dense") for name, size in sizes.items()]))
    print(read_sizes(directory / "packed"))


def _time(recipe: Recipe) -> None:
    print(
        "\ntraining step of a block, ternary against dense (nn.Linear as it comes), fp32, one thread, medians"
    )
    block = compare_step_speed()
    own = compare_step_speed(recipe.model_config(), batch_size=recipe.batch_size, num_tokens=SAMPLE_LENGTH)
    print(
        table(
            [
                ("SmolLM2-135M (width 576)", str(block), _in_words(block.ratio)),
                (f"this demo's (width {recipe.hidden_size})", str(own), _in_words(own.ratio)),
            ]
        )
    )
    print("  Tiny widths are slower than dense: quantising costs more there than the products save.")


def _in_words(ratio: float) -> str:
    return f"{ratio:.2f}x as fast as dense" if ratio >= 1 else f"{ratio:.2f}x: slower than dense on this CPU"


@contextlib.contextmanager
def _directory(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="wrinklefree-demo-") as name:
            yield Path(name)
    else:
        check_target(keep)
        keep.mkdir(parents=True, exist_ok=True)
        yield keep


def _cpu_seconds() -> str:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    verdict = (
        ""
        if seconds <= CPU_SECONDS_ALLOWED
        else f", more than the {CPU_SECONDS_ALLOWED} meant for it: a slow or busy CPU"
    )
    return f"{seconds:.0f} CPU-seconds{verdict}"
