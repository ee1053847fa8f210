"""Five canaries: credentials in the environment, in a URL of the configuration, in the text of an exception.

Whatever a run does, ends or shows, none of them is in a line that it prints or a file that it writes.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wrinklefree.lightning.module import WrinkleFreeLightningModule

CANARIES = {
    "WANDB_API_KEY": "5ec2e7" * 6 + "cafe",
    "HF_TOKEN": "hf_" + "CanaryOfTheHub" * 2,
    "AWS_SECRET_ACCESS_KEY": "c4nAry/OfTheBucket+" * 2,
}
IN_URL = "c4nary-in-a-url"
IN_EXCEPTION = "c4nary-in-an-exception"
ALL = [*CANARIES.values(), IN_URL, IN_EXCEPTION]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")


def failing(usual: Callable[..., Any], *, at: int) -> Callable[..., Any]:
    """A step of the training that ends in an exception which knows every secret."""

    def training_step(self: WrinkleFreeLightningModule, *arguments: Any) -> None:
        if self.progress.step == at:
            told = ", ".join(f"{name}={os.environ[name]}" for name in CANARIES)
            raise RuntimeError(f"GET https://bob:{IN_EXCEPTION}@example.com/x failed; sent {told}")
        usual(self, *arguments)

    return training_step


@pytest.mark.parametrize("wandb", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_no_secret_is_in_any_line_or_file(
    wandb: str,
    wrinklefree: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    arguments = [
        "experiment=quick",
        "training.influence.enabled=false",
        "training.max_seq_length=16",
        "training.max_steps=4",
        "training.checkpoint.save_interval=2",
        "training.validation.every=2",
        f"training.logging.wandb.enabled={wandb}",
        "gcs.enabled=true",
        f"gcs.bucket=memory://bob:{IN_URL}@bucket/runs",
        f"output_dir={tmp_path}",
    ]
    run_dir = tmp_path / "checkpoints" / "quick" / "base_checkpoint"
    said: list[str] = []

    def command(*parts: object, code: int) -> str:
        ended = wrinklefree(*parts)
        said.append(ended.out + ended.err)
        assert ended.exit_code == code, ended.err
        return said[-1]

    with monkeypatch.context() as patch:
        usual = WrinkleFreeLightningModule.training_step
        patch.setattr(WrinkleFreeLightningModule, "training_step", failing(usual, at=3))
        broken = command("train", "--debug", *arguments, code=1)
    assert "Traceback" in broken
    assert "GET https://***@example.com/x failed" in broken.splitlines()[-1]
    assert "resuming after step 2" in command("train", *arguments, code=0)
    refused = command(
        "train", *arguments, f"training.resume.checkpoint_path=ftp://a:{IN_URL}@b/c", "seed=7", code=2
    )
    assert "seed 42 → 7" in refused
    for shown in (("runs", "show", run_dir), ("runs", "diff", run_dir, run_dir), ("runs", "list", tmp_path)):
        command(*shown, code=0)
    for parts in (("config", "show"), ("config", "validate"), ("train", "--print-config")):
        command(*parts, *arguments, code=0)
    command("train", f"training.optimizer.lr=https://bob:{IN_URL}@b", code=2)

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"fingerprint.json", "config.yaml", "train_state.json", "metrics.jsonl", "metrics.csv"} <= names
    assert (run_dir / "wandb").exists() is (wandb == "true")
    for canary in ALL:
        assert [path for path in files if canary.encode() in path.read_bytes()] == []
        assert canary not in "".join(said) + caplog.text
    assert "memory://***@bucket/runs" in (run_dir / "fingerprint.json").read_text()
