"""What a run says while it runs, and what its arithmetic is held against."""

import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from wrinklefree.config import load_config
from wrinklefree.run import run
from wrinklefree.runs import read_metrics
from wrinklefree.training.flops import flops_per_token, multiplications_per_second
from wrinklefree.training.memory import memory_in_use

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
        (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=20)),
    ],
)
def test_flops_of_a_token_are_those_that_torch_counts(kind: type, config: object) -> None:
    model = kind(config)
    model.set_attn_implementation("eager")
    input_ids = torch.zeros(2, 32, dtype=torch.long)

    with FlopCounterMode(display=False) as counter:
        model(input_ids=input_ids, use_cache=False).logits.sum().backward()

    assert flops_per_token(model, 32) == pytest.approx(
        counter.get_total_flops() / input_ids.numel(), rel=0.01
    )


def test_an_unknown_model_or_device_has_no_mfu() -> None:
    assert flops_per_token(torch.nn.Linear(2, 3), 8) is None
    assert multiplications_per_second(torch.device("meta"), torch.float32) is None


def test_memory_is_what_the_system_says() -> None:
    before = memory_in_use(torch.device("cpu"))
    held = torch.ones(16_000_000)

    grown = memory_in_use(torch.device("cpu")) - before

    assert grown == pytest.approx(held.nbytes, rel=0.1)


def test_a_pipe_gets_plain_lines_with_every_number(
    tmp_path: Path,
    prepared_data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WRINKLEFREE_DATA", str(prepared_data))
    overrides = ["experiment=quick", "training.max_steps=4", "training.influence.enabled=false"]
    sizes = ["training.max_seq_length=16", "training.logging.log_interval=3"]

    result = run(load_config([*overrides, *sizes, f"output_dir={tmp_path}"]))

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    rows = {row["step"]: row for row in read_metrics(result.directory / "metrics.jsonl")}
    assert [line.split()[1] for line in lines] == ["1/4", "3/4", "4/4"]
    for line, step in zip(lines, (1, 3, 4), strict=True):
        row = rows[step]
        assert (
            f"  loss {row['loss']:.4f}  continue_pretrain {row['losses']['continue_pretrain']:.4f}  " in line
        )
        assert f"  λ {row['lambda']:.2f}  μ {row['mu']:.2f}  lr {row['lr']:.2e}  " in line
        waits = r"(?:\w+ \d+% of the time  )*"
        end = rf"  [\d,]+ tokens/s  {waits}MFU \d+\.\d%  memory [\d.]+ [MG]B  0:00:\d\d left$"
        assert re.search(end, line)
    assert lines[-1].endswith("0:00:00 left")


TERMINAL = """
from wrinklefree.terminal import LiveLine
line = LiveLine()
line.show("step 1/3  " + "x" * 500, keep=True)
print("validation at step 1")
line.show("step 2/3", keep=False)
line.show("step 3/3", keep=True)
line.close()
print("finished")
"""


def test_a_terminal_has_one_line_that_stays_the_last() -> None:
    screen = b"".join(shown_in_a_terminal(TERMINAL)).decode().replace("\r", "")

    before, _, after = screen.partition("validation at step 1")
    assert "step 1/3" in before
    assert "…" in before  # cut to the width of the terminal
    assert "step 1/3" in after  # printed again below what came between
    assert re.search(r"step 3/3\s", after)
    assert "\x1b[2K" in after  # a line is erased before it is written again
    assert re.search(r"step 3/3 *\n(\x1b\S*)*finished\n", after)


def shown_in_a_terminal(program: str) -> Iterator[bytes]:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "60", "LINES": "20"}
    child = subprocess.Popen([sys.executable, "-c", program], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        yield piece
    assert child.wait(timeout=30) == 0
    os.close(ours)
