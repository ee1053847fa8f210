"""Prove that a GGUF file says what a checkpoint says, and that an engine computes with it what PyTorch does.

    print(verify_gguf("model.gguf", "outputs/run"))

First the bytes (`file_check`), then the predictions (`engine_check`), in a real engine where one runs the
type: upstream llama.cpp reads neither Microsoft's I2_S nor its ReLU² graph.
"""

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

from bitnet_serving.checkpoint_source import CheckpointSource, open_source
from bitnet_serving.engine import Engine
from bitnet_serving.engine_check import INT8_NOISE_FACTOR, LARGEST_FLOAT_KL, EngineCheck, check_engine, split
from bitnet_serving.file_check import FileCheck, check_file, stored_tables
from bitnet_serving.gguf_reader import GGUFFile, read_gguf
from bitnet_serving.sample_text import DEFAULT_TEXT
from bitnet_serving.tokenizer_metadata import TOKENIZER_NAME
from durable import ExitCode, UserError

POSITIONS = 256
ENGINE_PACKAGE = "xllamacpp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the result."""

    check: str
    ok: bool | None
    """None for what is only told."""
    found: str
    allowed: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was compared, and whether it may be trusted."""

    path: Path
    checkpoint: Path
    rows: tuple[Row, ...]
    problems: tuple[str, ...]
    engine: EngineCheck | None
    """None where no engine was run."""
    not_run: str | None = None
    """Why not."""
    engine_required: bool = False

    @property
    def ok(self) -> bool:
        return not any(row.ok is False for row in self.rows) and not (self.not_run and self.engine_required)

    @property
    def exit_code(self) -> int:
        return 0 if self.ok else ExitCode.BAD_DATA

    def row(self, check: str) -> Row:
        """The line of this name."""
        return next(row for row in self.rows if row.check == check)

    def to_json(self) -> str:
        """Everything, for a program."""
        content: dict[str, Any] = asdict(self)
        return json.dumps(content | {"ok": self.ok, "exit_code": self.exit_code}, indent=2, default=str)

    def __str__(self) -> str:
        marks = {True: "ok", False: "FAILED", None: ""}
        lines = [f"{self.path} against {self.checkpoint}", ""]
        lines += [
            f"  {row.check:<22}{marks[row.ok]:<8}{row.found}" + (f"   ({row.allowed})" if row.allowed else "")
            for row in self.rows
        ]
        if self.problems:
            lines += ["", *(f"  {problem}" for problem in self.problems)]
        return "\n".join([*lines, "", self._verdict()])

    def _verdict(self) -> str:
        if not self.ok and not any(row.ok is False for row in self.rows):
            return f"bytes proven, engine not run, and --require-engine was given: {self.not_run}"
        if not self.ok:
            return "this file is not that checkpoint"
        if self.not_run:
            return f"bytes proven, engine not run: {self.not_run}"
        return "bytes proven, and the engine predicts what PyTorch predicts"


def verify_gguf(
    path: str | PathLike[str],
    checkpoint: str | PathLike[str],
    *,
    require_engine: bool = False,
    positions: int = POSITIONS,
    lora: str | PathLike[str] | None = None,
    text: str | None = None,
    threads: int = 1,
) -> Verification:
    """Compare a file with the checkpoint (or the newest of the run) that it was exported from.

    `lora` is the adapter that holds the checkpoint's low-rank corrections; `text` is read in place of a page
    of English prose.
    """
    path = Path(path)
    if positions < 1:
        raise UserError("--positions: must be at least 1", positions)
    file = read_gguf(path)
    source = open_source(Path(checkpoint))
    bytes_check = check_file(file, source, has_adapter=lora is not None)
    rows = [*_file_rows(bytes_check)]
    engine_check: EngineCheck | None = None
    not_run = _why_not(bytes_check)
    if not_run is None:
        context = _context(file, bytes_check)
        with Engine(path, lora=lora, threads=threads, context=context) as engine:
            ids, tokenizer_row = _tokens(engine, source, DEFAULT_TEXT if text is None else text)
            if len(ids) < positions:
                raise UserError("--text: too short", f"{len(ids)} tokens", f"give {positions} or more")
            engine_check = check_engine(
                path,
                source.directory,
                split(ids, positions, context),
                engine,
                body=bytes_check.body,
                tables=stored_tables(file, bytes_check.tensors),
            )
        rows += [tokenizer_row, *_engine_rows(engine_check)]
    return Verification(
        path=path,
        checkpoint=source.directory,
        rows=tuple(rows),
        problems=tuple(_first_problems(bytes_check)),
        engine=engine_check,
        not_run=not_run,
        engine_required=require_engine,
    )


def _file_rows(check: FileCheck) -> list[Row]:
    def row(kind: str, found: str, allowed: str = "") -> Row:
        wrong = len(check.problems.get(kind, ()))
        return Row(
            check=kind, ok=wrong == 0, found=f"{wrong} wrong of {found}" if wrong else found, allowed=allowed
        )

    return [
        row("architecture", f"{check.architecture.name}, {' or '.join(check.architecture.activations)}"),
        row("metadata", f"{check.num_metadata} numbers equal config.json"),
        row("tensors", f"{check.num_tensors} of the checkpoint's names and shapes"),
        row("codes", f"{check.num_codes:,} ternary weights, as {check.body}"),
        row("scales", f"largest relative error {check.largest_scale_error:.1e}", "at most 4.9e-04"),
        row("values", "gains, biases, embedding, head: as their types round"),
    ]


def _engine_rows(check: EngineCheck) -> list[Row]:
    against = "float activations" if check.is_float else "int8 activations"
    noise = f"its own int8 rounding {check.int8_noise:.1e}"
    named = f"{check.num_positions} positions, {check.num_named} tokens each"
    allowed = f"at most {check.largest_kl:.1e}"
    if check.largest_kl > LARGEST_FLOAT_KL:
        allowed += f", {INT8_NOISE_FACTOR:g} × {noise}"
    elif not check.is_float:
        allowed += f"; {noise}"
    other, other_kl = ("int8", check.kl_to_int8) if check.is_float else ("float", check.kl_to_float)
    clear = f"{check.num_clear - check.num_clear_missed} of {check.num_clear} clear preferences"
    return [
        Row(check="engine", ok=None, found=f"{ENGINE_PACKAGE} {version(ENGINE_PACKAGE)}, {named}"),
        Row(
            check=f"KL to {against.split()[0]}",
            ok=check.kl <= check.largest_kl,
            found=f"{check.kl:.1e} nats from PyTorch with {against}",
            allowed=allowed,
        ),
        Row(
            check=f"KL to {other}",
            ok=None,
            found=f"{other_kl:.1e} nats",
            allowed=noise if check.is_float else "",
        ),
        Row(
            check="most likely token",
            ok=check.num_clear_missed == 0 if check.is_float else None,
            found=clear,
            allowed=f"wherever it leads by 5 × {check.error:.1e}",
        ),
    ]


def _first_problems(check: FileCheck) -> list[str]:
    lines: list[str] = []
    for kind, found in check.problems.items():
        lines += [f"{kind}: {line}" for line in found[:3]]
        if len(found) > 3:
            lines.append(f"{kind}: {len(found) - 3} more")
    return lines


def _why_not(check: FileCheck) -> str | None:
    if check.body == "i2_s":
        return "only Microsoft's engine reads I2_S"
    if not check.architecture.in_upstream:
        return f"only Microsoft's engine has the graph {check.architecture.name}"
    return None


def _context(file: GGUFFile, check: FileCheck) -> int:
    length = file.metadata.get(f"{check.architecture.name}.context_length")
    return min(length, 512) if isinstance(length, int) and length > 1 else 512


def _tokens(engine: Engine, source: CheckpointSource, text: str) -> tuple[list[int], Row]:
    """The engine's tokens, and whether they are the checkpoint's."""
    [ids] = engine.tokenize([text], add_special=True)
    tokenizer_path = source.directory / TOKENIZER_NAME
    if not tokenizer_path.is_file():
        return ids, Row(check="tokenizer", ok=None, found="none in the checkpoint to compare with")
    from tokenizers import Tokenizer

    expected = Tokenizer.from_file(str(tokenizer_path)).encode(text).ids
    same = ids == expected
    found = f"{len(text):,} characters to " + (f"the same {len(ids):,} ids" if same else "other ids")
    return ids, Row(check="tokenizer", ok=same, found=found)
