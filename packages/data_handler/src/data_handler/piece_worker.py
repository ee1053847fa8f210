"""A process that prepares pieces: `python -m data_handler.piece_worker`, started by `piece_pool`.

    stdin   {"directory": …, "fast": …}         the tokenizer, first of all
            {"name": …, "source": …, …}         a job, again and again
    stdout  {"tokens": 12, "bytes": 34}         now and then, while it works
            {"metadata": …} or {"error": …}     the end of the job

Lines of JSON in a process of its own, rather than a fork or `multiprocessing`: nothing of the parent is
needed here, neither its threads nor its main module nor torch, which take seconds to import. When the parent
is gone, however it went, stdin ends, and so does this process, at once; the piece that it was writing never
gets its name.
"""

import json
import logging
import os
import signal
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

from data_handler.config import SourceConfig, SourceFormat
from data_handler.encoder import TextEncoder
from data_handler.pieces import prepare_piece
from data_handler.progress import Advance
from data_handler.sources import Piece
from durable import UserError


@dataclass(frozen=True, slots=True)
class Job:
    """A piece of a source, and the directory that it becomes."""

    name: str
    source: SourceConfig
    piece: Piece
    target: Path
    max_line_bytes: int

    def do(self, encoder: TextEncoder, advance: Advance) -> dict[str, Any]:
        """Prepare it; returns what its manifest says."""
        return prepare_piece(
            self.name,
            self.source,
            self.piece,
            encoder,
            self.target,
            max_line_bytes=self.max_line_bytes,
            advance=advance,
        )

    def to_json(self) -> dict[str, Any]:
        """For `from_json`."""
        return asdict(self) | {"target": str(self.target)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Job":
        """The job that another process wrote."""
        source, piece = content["source"], content["piece"]
        source |= {"format": SourceFormat(source["format"]), "text_fields": tuple(source["text_fields"])}
        piece |= {"format": SourceFormat(piece["format"])}
        parts = {"source": SourceConfig(**source), "piece": Piece(**piece), "target": Path(content["target"])}
        return cls(**content | parts)


def error_to_json(error: UserError) -> dict[str, Any]:
    """For `error_from_json`."""
    return {key: getattr(error, key) for key in ("what", "found", "fix", "exit_code", "choices")}


def error_from_json(content: dict[str, Any]) -> UserError:
    """The error that another process met."""
    return UserError(**content)


def main() -> None:
    """Do jobs until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is asked to stop, and stops us
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    results = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # whatever a library prints does not get between the results
    lines: SimpleQueue[dict[str, Any]] = SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    settings = lines.get()
    encoder = TextEncoder(Path(settings["directory"]), fast=settings["fast"])
    while True:
        _say(results, _answer(Job.from_json(lines.get()), encoder, results))


def _listen(lines: SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin.buffer:
        lines.put(json.loads(line))
    os._exit(0)


def _answer(job: Job, encoder: TextEncoder, results: TextIO) -> dict[str, Any]:
    try:
        advance = lambda tokens, size: _say(results, {"tokens": tokens, "bytes": size})  # noqa: E731
        return {"metadata": job.do(encoder, advance)}
    except UserError as error:
        return {"error": error_to_json(error)}
    except Exception:
        return {"fault": traceback.format_exc()}


def _say(results: TextIO, answer: dict[str, Any]) -> None:
    results.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
