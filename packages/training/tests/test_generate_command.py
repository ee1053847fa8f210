"""`wrinklefree generate` and `chat` on a checkpoint with the demo tokenizer, and the text that they print."""

import io
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from bitnet_arch import BlockDiffusion, convert_to_bitnet, load_bitnet, save_bitnet, set_block_diffusion
from bitnet_arch.testing import tiny_llama
from data_handler.demo import TOKENIZER_DIR
from wrinklefree.generation import Decoding, Prefix, generate_ids, open_decoder, text_pieces

SPEED = re.compile(r"(\d+) tokens in [\d.]+ s, [\d.]+ tokens/s, ([\d.]+) tokens per forward\n")


def write_model(directory: Path, *, diffusion: bool = True, template: bool = True, **config: Any) -> Path:
    model, tokenizer = tiny_llama(**config), AutoTokenizer.from_pretrained(TOKENIZER_DIR)
    with torch.no_grad():  # fresh weights are small: nearly every token would be followed by itself
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)
    convert_to_bitnet(model)
    if diffusion:
        set_block_diffusion(model, BlockDiffusion(mask_token_id=tokenizer.mask_token_id, block_size=8))
    if not template:
        tokenizer.chat_template = None
    return save_bitnet(model, directory, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("saved") / "tiny")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Knows no [MASK] and no chat."""
    return write_model(tmp_path_factory.mktemp("plain") / "tiny", diffusion=False, template=False)


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZER_DIR)


def test_generate_prints_what_transformers_generates(
    wrinklefree: Callable[..., Any], saved: Path, tokenizer: Any
) -> None:
    model: Any = load_bitnet(saved)
    prompts, expected = ["The fox", "12 + 3 ="], []
    for prompt in prompts:
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        written = model.generate(
            tokens, do_sample=False, max_new_tokens=9, eos_token_id=0, suppress_tokens=[2], pad_token_id=0
        )
        expected.append(tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True))

    ended = wrinklefree("generate", saved, "-p", prompts[0], "--prompt", prompts[1], "--max-new-tokens", 9)

    assert (ended.exit_code, ended.out) == (0, f"{expected[0]}\n\n{expected[1]}\n")
    speed = SPEED.search(ended.err)
    assert speed is not None
    assert speed.groups() == ("18", "1.00")


@pytest.mark.parametrize("how", [["--no-stream"], ["--no-prefix-cache"], []])
def test_diffusion_prints_what_is_filled_in(
    wrinklefree: Callable[..., Any],
    saved: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    how: list[str],
) -> None:
    decoding = Decoding(
        mode="diffusion", max_new_tokens=20, threshold=0.02, temperature=0.7, top_p=0.9, seed=5, sub_block=4
    )
    expected = generate_ids(load_bitnet(saved), tokenizer("The fox")["input_ids"], decoding, ends=[0])
    monkeypatch.setattr("sys.stdin", io.StringIO("The fox\n"))
    options = "--mode diffusion --max-new-tokens 20 --threshold 0.02 --temperature 0.7 --top-p 0.9 --seed 5"

    ended = wrinklefree("generate", saved, *options.split(), "--sub-block", 4, *how)

    assert ended.exit_code == 0
    assert ended.out == tokenizer.decode(expected.tokens, skip_special_tokens=True) + "\n"
    speed = SPEED.search(ended.err)
    assert speed is not None
    assert speed.groups() == (str(len(expected.tokens)), f"{expected.tokens_per_forward:.2f}")
    assert expected.tokens_per_forward > 1


def test_the_newest_checkpoint_of_a_run_is_opened(saved: Path, plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "run/checkpoints/step_000002")
    shutil.copytree(saved, tmp_path / "run/checkpoints/step_000010")

    for name, has_template in (("run", True), ("run/checkpoints/step_2", False)):
        assert bool(open_decoder(str(tmp_path / name)).tokenizer.chat_template) == has_template


def test_a_model_directory_of_transformers_is_opened(
    wrinklefree: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    ended = wrinklefree("generate", tmp_path / "model", "-p", "the", "--max-new-tokens", 5)

    assert ended.exit_code == 0
    # Token 2, which the configuration of a fresh Llama ends at, is this tokenizer's [MASK].
    assert open_decoder(str(tmp_path / "model")).ends == {0}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--temperature", "-1"], "temperature: "),
        (["--temperature", "nan"], "temperature: "),
        (["--top-p", "0"], "top-p: "),
        (["--threshold", "1.5"], "threshold: .*0 to 1"),
        (["--max-new-tokens", "0"], "max-new-tokens: "),
        (["--max-new-tokens", "256"], "max-new-tokens: beyond the model's positions"),
        (["--mode", "diffusion", "--sub-block", "3"], "sub-block: does not divide.*divisor of 8"),
        (["-p", "x " * 500], "prompt: longer than the model's positions"),
        (["-p", ""], "prompt: has no tokens"),
        (["--mode", "block"], "'ar', 'diffusion'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    wrinklefree: Callable[..., Any], saved: Path, options: list[str], said: str
) -> None:
    ended = wrinklefree("generate", saved, "-p", "The", *options)

    assert_one_line(ended, said)


def assert_one_line(ended: Any, said: str, exit_code: int = 2) -> None:
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert (ended.exit_code, ended.out, len(errors)) == (exit_code, "", 1)
    assert re.search(said, errors[0])
    assert "Traceback" not in ended.err


def test_a_model_that_cannot_do_it_is_one_line(
    wrinklefree: Callable[..., Any], saved: Path, plain: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(saved, tmp_path / "silent")
    for name in ("tokenizer.json", "tokenizer_config.json", "manifest.json"):
        (tmp_path / "silent" / name).unlink()

    assert_one_line(wrinklefree("generate", plain, "-p", "x", "--mode", "diffusion"), r"no \[MASK\]")
    assert_one_line(wrinklefree("generate", "./missing", "-p", "x"), "no such file or directory")
    assert_one_line(wrinklefree("generate", "tiny_llama", "-p", "x"), "tiny_llama.*no tokenizer")
    assert_one_line(wrinklefree("generate", tmp_path / "empty", "-p", "x"), "no checkpoint", exit_code=4)
    assert_one_line(wrinklefree("chat", plain), "no chat template")
    assert_one_line(wrinklefree("chat", saved, "--mode", "diffusion", "--sub-block", 3), "sub-block")


def chat_prompt(tokenizer: Any, *contents: str) -> list[int]:
    """ChatML, as the demo tokenizer's template has it."""
    roles = ("user", "assistant")
    turns = [f"<|im_start|>{roles[n % 2]}\n{text}<|im_end|>\n" for n, text in enumerate(contents)]
    tokens: list[int] = tokenizer("".join(turns) + "<|im_start|>assistant\n")["input_ids"]
    return tokens


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_chat_answers_with_all_that_was_said(
    wrinklefree: Callable[..., Any], saved: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    model, decoding = load_bitnet(saved), Decoding(mode=mode, max_new_tokens=12)
    said = ["hello"]
    for question in ("and you?", None):
        answer = generate_ids(model, chat_prompt(tokenizer, *said), decoding, ends=[0, 4])
        said += [tokenizer.decode(answer.tokens, skip_special_tokens=True), *([question] if question else [])]
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nand you?\n/exit\nnever asked\n"))

    ended = wrinklefree("chat", saved, "--max-new-tokens", 12, "--mode", mode)

    assert (ended.exit_code, ended.out) == (0, f"{said[1]}\n{said[3]}\n")
    assert SPEED.search(ended.err) is not None


def test_what_the_template_puts_behind_an_answer_ends_it(saved: Path, tokenizer: Any) -> None:
    assert open_decoder(str(saved)).chat_ends() == {0, tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_a_chat_that_has_become_too_long_forgets_its_oldest_turns(
    wrinklefree: Callable[..., Any], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = ["x" * 80, "y" * 80, "z" * 600, "w" * 80]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(questions)))

    ended = wrinklefree("chat", saved, "--max-new-tokens", 20)

    assert ended.exit_code == 0
    assert ended.out.count("\n") >= 3
    assert ended.err.count("the oldest turn is forgotten") >= 2
    assert len(re.findall("^error: prompt: longer", ended.err, re.MULTILINE)) == 1


def interrupt_fourth_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C does."""
    count, read = iter(range(1000)), Prefix.read

    def reading(self: Prefix, tokens: list[int]) -> torch.Tensor:
        if next(count) == 3:
            raise KeyboardInterrupt
        return read(self, tokens)

    monkeypatch.setattr(Prefix, "read", reading)


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(
    wrinklefree: Callable[..., Any], saved: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    model = load_bitnet(saved)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand you?\n"))
    interrupt_fourth_read(monkeypatch)

    ended = wrinklefree("chat", saved, "--max-new-tokens", 12)

    first, second, rest = ended.out.split("\n")
    tokens = generate_ids(model, chat_prompt(tokenizer, "hello"), Decoding(max_new_tokens=3), ends=()).tokens
    assert first == tokenizer.decode(tokens)
    prompt = chat_prompt(tokenizer, "hello", first, "and you?")
    answer = generate_ids(model, prompt, Decoding(max_new_tokens=12), ends=[0, 4])
    assert second == tokenizer.decode(answer.tokens, skip_special_tokens=True)
    assert (ended.exit_code, rest) == (0, "")


def test_ctrl_c_ends_generate_with_what_there_is(
    wrinklefree: Callable[..., Any], saved: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    prompt: list[int] = tokenizer("In the morning")["input_ids"]
    tokens = generate_ids(load_bitnet(saved), prompt, Decoding(max_new_tokens=3), ends=()).tokens
    interrupt_fourth_read(monkeypatch)

    ended = wrinklefree("generate", saved, "-p", "In the morning")

    assert ended.exit_code == 130
    assert ended.out == tokenizer.decode(tokens) + "\n"
    assert re.search(r"3 tokens in .* per forward\ninterrupted\n$", ended.err)


def test_ctrl_c_at_the_prompt_ends_the_chat(
    wrinklefree: Callable[..., Any], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)

    ended = wrinklefree("chat", saved)

    assert (ended.exit_code, ended.out) == (130, "")
    assert ended.err.endswith("interrupted\n")


@pytest.mark.slow
def test_a_signal_ends_generate_cleanly(tmp_path: Path) -> None:
    model = write_model(tmp_path / "long", max_position_embeddings=100_000)
    options = ["-p", "The", "--max-new-tokens", "90000"]
    command = [sys.executable, "-m", "wrinklefree", "generate", str(model), *options]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.read(1)

    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)

    assert child.returncode == 130
    assert out.endswith(b"\n")
    assert b"Traceback" not in err
    assert err.endswith(b"tokens per forward\ninterrupted\n")


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: bytes of rare characters are tokens, and the first space of a text is dropped."""
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocabulary |= {"\N{LOWER ONE EIGHTH BLOCK}" + letter: 300 + n for n, letter in enumerate("abc")}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def pieces_of(tokenizer: Any, tokens: list[int], size: int) -> list[str]:
    def chunks() -> Iterator[list[int]]:
        for start in range(0, len(tokens), size):
            yield tokens[start : start + size]

    return list(text_pieces(tokenizer, chunks()))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_text_is_never_half_a_character(tokenizer: Any, size: int) -> None:
    text = "naïve 🦊🦊, 日本 and é"
    tokens = tokenizer(text)["input_ids"]

    pieces = pieces_of(tokenizer, tokens, size)

    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    # What never becomes a character is shown at last.
    cut = tokenizer("a 🦊")["input_ids"][:-1]
    assert "".join(pieces_of(tokenizer, cut, size)) == tokenizer.decode(cut)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_text_of_bytes_keeps_its_spaces_and_characters(size: int) -> None:
    tokenizer = byte_fallback_tokenizer()
    fox = [byte + 1 for byte in "🦊".encode()]
    tokens = [300, *fox, *fox, 301, *fox, 302]

    pieces = pieces_of(tokenizer, tokens, size)

    assert "".join(pieces) == "a🦊🦊 b🦊 c"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_model_is_opened_for_evaluation(saved: Path) -> None:
    model: PreTrainedModel = open_decoder(str(saved)).model

    assert not model.training
