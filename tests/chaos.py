"""Kill training again and again, and compare what it did with a run that nobody killed.

A run is compared by its metrics (loss, samples, mixture weights of every step, as last written) and by the
bytes of its final weights.
"""

import hashlib
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from forked import start_training

from wrinklefree.runs import read_metrics

LIFE_SECONDS = 120.0


@dataclass
class Training:
    """One run directory, and the command that fills it."""

    output_dir: Path
    overrides: list[str]
    lives: int = 0

    @property
    def run_dir(self) -> Path:
        experiment = self.overrides[0].removeprefix("experiment=")
        stage = {"chaos": "unified", "quick": "base"}[experiment]
        return self.output_dir / "checkpoints" / experiment / f"{stage}_checkpoint"

    @property
    def log(self) -> Path:
        return self.output_dir / "log.txt"

    def start(self) -> BaseProcess:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.lives += 1
        arguments = [*self.overrides, f"output_dir={self.output_dir}"]
        return start_training(arguments, self.log)

    def finish(self) -> int:
        """Run to the end; the exit code."""
        process = self.start()
        process.join(LIFE_SECONDS)
        assert process.exitcode is not None, f"still running after {LIFE_SECONDS} s"
        return process.exitcode

    def steps_logged(self) -> int:
        """Complete lines of metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        return path.read_bytes().count(b'"kind":"step"') if path.exists() else 0

    def is_writing(self) -> bool:
        """Is a checkpoint being written at this moment?"""
        folder = self.run_dir / "checkpoints"
        return folder.is_dir() and any(path.name.startswith(".") for path in folder.iterdir())

    def trace(self) -> dict[int, tuple[Any, ...]]:
        """Step → everything that must be equal."""
        rows = read_metrics(self.run_dir / "metrics.jsonl")
        keys = ("loss", "losses", "samples", "weights", "lambda", "mu", "lr", "grad_norm")
        return {row["step"]: tuple(repr(row[key]) for key in keys) for row in rows}

    def last_step(self) -> int:
        """The step that was written last, which is not the highest after a kill."""
        text = (self.run_dir / "metrics.jsonl").read_text(errors="replace")
        steps = re.findall(r'^\{"kind":"step","version":\d+,"step":(\d+),', text, re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def final_digest(self) -> str:
        weights = self.run_dir / "checkpoints" / "final" / "model.safetensors"
        return hashlib.sha256(weights.read_bytes()).hexdigest()

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]


@dataclass
class Kills:
    """What was done to a run."""

    signals: list[str] = field(default_factory=list)
    steps_lost: list[tuple[str, int]] = field(default_factory=list)
    """After which signal, how many logged steps were run again."""


EXPECTED_EXIT = {"KILL": -signal.SIGKILL, "TERM": 143, "INT": 130, "INT2": 130}


def torment(training: Training, rng: random.Random, *, num_kills: int, max_steps: int) -> Kills:
    """Kill the run until `num_kills` landed, then let it finish.

    It starts anew when it finished too early.
    """
    kills = Kills()
    while len(kills.signals) < num_kills:
        before = training.steps_logged()
        process = training.start()
        name = rng.choice(["KILL", "KILL", "KILL", "TERM", "INT", "INT2"])
        landed = _wait(process, _moment(training, rng, before, max_steps))
        if landed:
            _send(process, name)
        process.join(LIFE_SECONDS)
        code = process.exitcode
        assert code is not None, f"hung after {name}: {training.last_words()}"
        if landed and code != 0:
            assert code == EXPECTED_EXIT[name], f"{name} ended with {code}: {training.last_words()}"
            kills.signals.append(name)
            logged = training.last_step() if training.steps_logged() > before else 0  # of this life
            kills.steps_lost.append((name, max(0, logged - _newest_step(training))))
        else:
            assert code == 0, training.last_words()
            if len(kills.signals) < num_kills:
                shutil.rmtree(training.run_dir)
    assert training.finish() == 0, training.last_words()
    return kills


def _newest_step(training: Training) -> int:
    names = [path.name for path in (training.run_dir / "checkpoints").glob("step_*")]
    return max((int(name[5:]) for name in names), default=0)


def _moment(training: Training, rng: random.Random, before: int, max_steps: int) -> Callable[[], bool]:
    """When to kill: after some more steps, at a random time, or inside a write."""
    kind = rng.choice(["step", "time", "write"])
    if kind == "step":
        wanted = before + rng.randint(1, max(2, max_steps // 4))
        return lambda: training.steps_logged() >= wanted
    if kind == "time":
        until = time.monotonic() + rng.uniform(0.5, 6.0)
        return lambda: time.monotonic() >= until
    steps = before + rng.randint(0, 6)
    return lambda: training.steps_logged() >= steps and training.is_writing()


def _wait(process: BaseProcess, is_time: Callable[[], bool]) -> bool:
    """True when the moment came while the process was alive."""
    deadline = time.monotonic() + LIFE_SECONDS
    while process.is_alive() and time.monotonic() < deadline:
        if is_time():
            return True
        time.sleep(0.002)
    return False


def _send(process: BaseProcess, name: str) -> None:
    assert process.pid is not None
    try:
        os.kill(process.pid, getattr(signal, f"SIG{name.removesuffix('2')}"))
        if name.endswith("2"):
            time.sleep(0.01)
            os.kill(process.pid, signal.SIGINT)
    except ProcessLookupError:
        return
