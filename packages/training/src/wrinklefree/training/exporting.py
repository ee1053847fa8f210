"""What a run makes must leave it: asked before it trains, not after weeks.

`choose_subln` and `require_exportable` look at the model's shape. `try_export` writes the first layers of the
model as they will be at the end (λ = μ = 1), reads every code back, and loads the file in the engine.
"""

import json
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitnet_arch import SubLNPlacement, walk
from bitnet_arch.bitlinear import BitLinear
from bitnet_arch.checkpoint import TENSORS_NAME, CheckpointFiles, checkpoint_files
from bitnet_arch.record import RECORD_NAME, BitnetRecord, read_record
from bitnet_serving.architectures import Architecture, ModelTraits, choose_architecture
from bitnet_serving.checkpoint_source import open_source
from bitnet_serving.engine import Engine
from bitnet_serving.export import export_gguf
from bitnet_serving.file_check import check_file
from bitnet_serving.gguf_reader import read_gguf
from durable import UserError, publish
from wrinklefree.config.schema import ExportTarget, RunConfig, SubLNChoice

KEY = "export.target=gguf"
OTHERWISE = "export.target=hf leaves it to transformers"
NUM_LAYERS = 2
"""Of the copy that is exported: all layers have the same shapes, and a large model is not written twice."""


def choose_subln(model: nn.Module, wanted: SubLNChoice) -> SubLNPlacement:
    """`auto`: in front of o and down where an engine can compute that; else none, with a line why."""
    if wanted is not SubLNChoice.auto:
        return SubLNPlacement(wanted.value)
    walked = walk(model)
    if set(walked.output_projections) <= walked.sub_norms.keys():
        return SubLNPlacement.none  # the family brings its own
    try:
        _architecture(model, walked.output_projections)
    except UserError as error:
        print(f"training.auto_convert.subln=auto: none here; {error.problem}", flush=True)
        return SubLNPlacement.none
    return SubLNPlacement.output


def require_exportable(model: nn.Module, config: RunConfig) -> None:
    """UserError for a model that no engine computes, unless it is not meant for one."""
    if config.export.target is ExportTarget.gguf:
        try:
            _architecture(model, _normed(model))
        except UserError as error:
            raise _refused(error) from None


def try_export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, config: RunConfig) -> None:
    """Export the first layers, read them back and load them; UserError when that fails."""
    if (
        config.export.target is not ExportTarget.gguf
        or config.max_steps < config.export.smoke_steps
        or tokenizer is None
    ):
        return
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="export-smoke-") as name:
        checkpoint, out, adapter = (Path(name) / part for part in ("checkpoint", "out.gguf", "lora.gguf"))
        files = first_layers(model)
        with publish(checkpoint, bytes_needed=files.num_bytes) as temporary:
            files.write(temporary)
            tokenizer.save_pretrained(str(temporary))
        try:
            has_lrc = bool(read_record(checkpoint).lrc)
            export_gguf(checkpoint, out, lora=adapter if has_lrc else None)
            check = check_file(read_gguf(out), open_source(checkpoint), has_adapter=has_lrc)
            for kind, lines in check.problems.items():
                raise UserError(f"{kind} of what was written: {lines[0]}")
            if check.architecture.in_upstream:
                with Engine(out, lora=adapter if has_lrc else None, context=16) as engine:
                    engine.generate([0], 1)
        except UserError as error:
            raise _refused(error) from None
    seconds = time.perf_counter() - begun
    print(f"export: the first layers were written, read back and loaded, {seconds:.1f} s", flush=True)


def first_layers(model: nn.Module) -> CheckpointFiles:
    """The files of a shallow copy at λ = μ = 1 and without sparsity; the tensors are the model's own."""
    files = checkpoint_files(model)
    gone = tuple(f"{layer.path}." for layer in walk(model).layers[NUM_LAYERS:])

    def kept(names: Iterable[str]) -> list[str]:
        return [name for name in names if not name.startswith(gone)] if gone else list(names)

    tensors = files.tensors[TENSORS_NAME]
    settings: dict[str, Any] = json.loads(files.texts["config.json"])
    settings["num_hidden_layers"] -= len(gone)
    if settings.get("layer_types"):
        settings["layer_types"] = settings["layer_types"][: settings["num_hidden_layers"]]
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / RECORD_NAME).write_text(files.texts[RECORD_NAME], encoding="utf-8")
        record: BitnetRecord = read_record(Path(name))
    finished = {"quant_amount": 1.0, "activation_amount": 1.0, "subln_amount": 1.0, "sparsity": None}
    record = replace(
        record,
        ternary=tuple(kept(record.ternary)),
        subln=replace(
            record.subln,
            inserted=tuple(kept(record.subln.inserted)),
            own={path: record.subln.own[path] for path in kept(record.subln.own)},
        ),
        lrc={path: record.lrc[path] for path in kept(record.lrc)},
        settings=record.settings | finished,
        exceptions={path: record.exceptions[path] | finished for path in kept(record.exceptions)},
        ties={name: record.ties[name] for name in kept(record.ties)},
        buffer_dtypes={name: record.buffer_dtypes[name] for name in kept(record.buffer_dtypes)},
    )
    return CheckpointFiles(
        tensors={TENSORS_NAME: {name: tensors[name] for name in kept(tensors)}},
        texts=files.texts
        | {"config.json": json.dumps(settings, indent=2) + "\n", RECORD_NAME: record.to_json()},
    )


def _normed(model: nn.Module) -> list[str]:
    return [
        path
        for path, layer in model.named_modules()
        if isinstance(layer, BitLinear) and layer.input_norm is not None
    ]


def _architecture(model: nn.Module, normed: Iterable[str]) -> Architecture:
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return choose_architecture(ModelTraits.of(walk(model), normed=list(normed), tensor_names=names))


def _refused(error: UserError) -> UserError:
    what = error.what.removeprefix("export gguf: ")
    fix = f"{error.fix}; {OTHERWISE}" if error.fix else OTHERWISE
    return UserError(f"{KEY}: {what}", error.found, fix, error.exit_code)
