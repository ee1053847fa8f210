"""Export a checkpoint as a GGUF file that llama.cpp or Microsoft's engine runs: written whole or not at all.

    from bitnet_serving.export import export_gguf

    print(export_gguf("outputs/run", "model.gguf"))

The codes and scales in the file are the checkpoint's. Widths that a block cannot hold are padded exactly
(`padding`). What no engine computes is refused with the setting to change: a model that is not fully
quantised yet, sparse activations, norms or activations that no graph has.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from bitnet_serving.architectures import (
    Architecture,
    ModelTraits,
    choose_architecture,
)
from bitnet_serving.checkpoint_source import CheckpointSource, open_source, refuse_unfinished
from bitnet_serving.dense_activations import DenseActivationsCost, cost_of_dense_activations
from bitnet_serving.file_tensors import FileTensors, ScaleLostError, require_i2_s
from bitnet_serving.formats import DENSE_FORMATS, GGUF_FORMATS, TERNARY_FORMATS
from bitnet_serving.gguf_values import MetaValue
from bitnet_serving.gguf_writer import TensorToWrite, write_gguf
from bitnet_serving.lora import AdapterReport, write_adapter
from bitnet_serving.model_metadata import context_length, model_metadata
from bitnet_serving.padding import ModelShape, Padding, plan_padding
from bitnet_serving.tokenizer_metadata import TokenizerMetadata, read_tokenizer
from durable import UserError

BODY_TYPES = ("tq2_0", "tq1_0", "q2_0", "i2_s", "f16", "bf16", "q8_0")
TABLE_TYPES = ("f16", "bf16", "q8_0", "f32")
PREFERENCES = ("speed", "size")
SCALES = ("blocks", "tensors")
FILE_TYPES = {"f16": 1, "q8_0": 7, "bf16": 32, "tq1_0": 36, "tq2_0": 37, "i2_s": 40, "q2_0": 41}
"""`general.file_type`."""
DECODE_COST = {
    "tq1_0": "decodes more slowly than tq2_0; `wrinklefree bench` says by how much here",
    "q2_0": "decodes far more slowly than tq2_0: upstream has no SIMD kernel for it on x86",
}
"""What the fewest bytes are paid with."""
NAMES_WITH_RULES = re.compile("phi-?3|modern-bert", re.IGNORECASE)
"""Engines treat special tokens in a way of their own in a model whose name has one of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was written, and how it differs from the checkpoint."""

    path: Path
    architecture: str
    types: dict[str, str]
    """Part → type."""
    num_bytes: dict[str, int]
    """Part → bytes of its tensors."""
    largest_scale_error: float
    padding: Padding
    tokenizer: str
    adapter: AdapterReport | None = None
    """Low-rank corrections in a file of their own."""
    dense_cost: DenseActivationsCost | None = None
    """Of a model whose activations are sparse."""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.path.stat().st_size / 1e6:,.1f} MB, architecture {self.architecture}"]
        for part, size in self.num_bytes.items():
            lines.append(f"  {part:<18}{self.types[part]:<8}{size / 1e6:>10,.2f} MB")
        lines.append(f"  largest relative scale error {self.largest_scale_error:.1e}")
        lines.append(f"  {self.padding}")
        lines.append(f"  tokenizer: {self.tokenizer}")
        if self.adapter is not None:
            lines.append(f"  {self.adapter}")
        if self.dense_cost is not None:
            lines.append(f"  {self.dense_cost}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def export_gguf(
    checkpoint: str | PathLike[str],
    out: str | PathLike[str],
    *,
    body: str | None = None,
    embeddings: str | None = None,
    head: str | None = None,
    prefer: str | None = None,
    scales: str = "blocks",
    at_full_quantisation: bool = False,
    dense_activations: bool = False,
    keep_mask: bool = False,
    merge_lrc: bool = False,
    lora: str | PathLike[str] | None = None,
    tokenizer: str | PathLike[str] | None = None,
    name: str | None = None,
    replace_existing: bool = False,
) -> ExportReport:
    """Write a checkpoint (or the newest one of a run) to `out`.

    Without `body`, `prefer` chooses among the types that hold ternary weights to the bit: `speed` (the
    default) the one that decodes fastest, `size` the one of fewest bytes. Low-rank corrections go to `lora`,
    an adapter for this very file, or into weights that are not ternary any more (`merge_lrc`). The file says
    `name`, else the directory's.
    """
    _require_choice("--type", body, BODY_TYPES)
    _require_choice("--embeddings", embeddings, TABLE_TYPES)
    _require_choice("--head", head, TABLE_TYPES)
    _require_choice("--prefer", prefer, PREFERENCES)
    _require_choice("--scales", scales, SCALES)
    if body is not None and prefer is not None:
        raise UserError("--prefer chooses a type, and --type names one", f"--type {body}", "give one of them")
    source = open_source(Path(checkpoint))
    architecture = choose_architecture(
        ModelTraits.of(source.walked, normed=source.normed, tensor_names=source.stored.keys())
    )
    body = body or _preferred(source, prefer, embeddings, head)
    embeddings, head = table_types(source, body, embeddings, head)
    refuse_unfinished(
        source.directory,
        source.record,
        allowed=at_full_quantisation,
        takes_plain_activations=body in ("f16", "bf16"),
    )
    is_sparse = _is_sparse(source, allowed=dense_activations)
    _check_lrc(source, body, merge=merge_lrc, adapter=lora is not None, in_blocks=scales == "blocks")
    if body == "i2_s":
        require_i2_s(architecture)
    rows, without = _vocabulary(source, keep_mask=keep_mask)
    padding = plan_for(source, body, embeddings, head)
    tensors = FileTensors(
        source=source,
        architecture=architecture,
        padding=padding,
        body=body,
        dense_body="f16",
        embeddings=embeddings,
        head=head,
        vocab_size=rows,
        without=without,
        scale_tensors=scales == "tensors" or body == "bf16",
        merge_lrc=merge_lrc,
    )
    tokenizer_dir = Path(tokenizer) if tokenizer else source.directory
    text = read_tokenizer(tokenizer_dir, vocab_size=rows, without=without)
    metadata = _metadata(source, architecture, body, padding, text, rows, name)
    # First, so that a model never stands there without its corrections.
    adapter = None if lora is None else _write_adapter(lora, tensors, source, replace_existing)
    try:
        write_gguf(out, metadata, list(tensors.listed()), replace=replace_existing)
    except ScaleLostError:
        if adapter is not None:
            adapter.path.unlink()
            raise _scales_and_adapter(f"{body}, which would round a scale by more than 2⁻¹¹") from None
        tensors = replace(tensors, scale_tensors=True)
        write_gguf(out, metadata, list(tensors.listed()), replace=replace_existing)
    dense_cost = (
        cost_of_dense_activations(source.directory, tokenizer_dir=tokenizer_dir) if is_sparse else None
    )
    types, num_bytes = _parts(tensors.listed(), body)
    return ExportReport(
        path=Path(out),
        architecture=architecture.name,
        types=types,
        num_bytes=num_bytes,
        largest_scale_error=tensors.largest_scale_error,
        padding=padding,
        tokenizer=text.kind,
        adapter=adapter,
        dense_cost=dense_cost,
        notes=(*text.notes, *_notes(source, architecture, tensors, prefer)),
    )


def table_types(
    source: CheckpointSource, body: str, embeddings: str | None, head: str | None
) -> tuple[str, str]:
    """The types of embedding and head; f16 beside ternary weights, the body's own beside others.

    q8_0 would halve them, and add more noise than the rounding of activations does to some models.
    """
    chosen = embeddings or (body if body in DENSE_FORMATS else "f16")
    if source.walked.is_tied and head not in (None, chosen):
        raise UserError(
            "--head: this model's head is its embedding",
            found=f"--head {head}, --embeddings {chosen}",
            fix="give --embeddings alone",
        )
    return chosen, head or chosen


def plan_for(source: CheckpointSource, body: str, embeddings: str, head: str) -> Padding:
    """How the model is widened for these types; the same for whoever reads the file back."""
    shape = ModelShape.of_config(source.config, sub_norms=bool(source.normed))
    form = GGUF_FORMATS[body]
    tables = [GGUF_FORMATS[embeddings], GGUF_FORMATS[head]]
    return plan_padding(
        shape,
        form.block_columns,
        bytes_per_weight=form.block_bytes / form.block_columns,
        embedding_block=max(each.block_columns for each in tables),
        embedding_bytes_per_weight=sum(each.block_bytes / each.block_columns for each in tables) / 2,
    )


def _require_choice(option: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise UserError(f"{option}: no such choice", value, choices=choices)


def _preferred(source: CheckpointSource, prefer: str | None, embeddings: str | None, head: str | None) -> str:
    if prefer != "size":
        return "tq2_0"
    sizes = {
        name: plan_for(source, name, *table_types(source, name, embeddings, head)).num_bytes
        for name in TERNARY_FORMATS
        if name != "i2_s"  # another engine's
    }
    return min(sizes, key=sizes.__getitem__)


def _is_sparse(source: CheckpointSource, *, allowed: bool) -> bool:
    """Does it leave activations out? UserError when that is so and not `allowed` to be lost."""
    for path in source.record.ternary:
        sparsity = source.record.settings_of(path)["sparsity"]
        if sparsity and sparsity["ratio"]:
            if allowed:
                return True
            raise UserError(
                f"{source.directory}: no engine leaves activations out",
                found=f"{path} with sparsity {sparsity['ratio']:g}",
                fix="export it with all of them and see what that costs: --dense-activations",
            )
    return False


def _check_lrc(source: CheckpointSource, body: str, *, merge: bool, adapter: bool, in_blocks: bool) -> None:
    if merge and adapter:
        raise UserError("--lora, --merge-lrc: a correction is added once", "both", "give one of them")
    if merge and body in TERNARY_FORMATS:
        raise UserError(
            f"--merge-lrc: {body} holds ternary weights, and a corrected one is not",
            fix="use --type f16, bf16 or q8_0, or leave the correction in a file of its own: --lora",
        )
    if source.record.lrc and not (merge or adapter):
        raise UserError(
            f"{source.directory}: has low-rank corrections",
            found=f"{len(source.record.lrc)} of them",
            fix="write an adapter for them: --lora OUT-lora.gguf, or merge them: --merge-lrc --type f16",
        )
    if (adapter or merge) and not source.record.lrc:
        option = "--lora" if adapter else "--merge-lrc"
        raise UserError(f"{option}: {source.directory} has no low-rank corrections", fix="leave it out")
    if adapter and (body == "bf16" or not in_blocks):
        raise _scales_and_adapter("--type bf16" if body == "bf16" else "--scales tensors")
    if adapter and body == "i2_s":
        raise UserError("--lora: Microsoft's engine adds no corrections to i2_s", fix="use --type tq2_0")


def _scales_and_adapter(found: str) -> UserError:
    return UserError(
        "--lora: an engine would multiply the correction by a scale that has a tensor of its own",
        found,
        "use another --type, or --merge-lrc",
    )


def _write_adapter(
    path: str | PathLike[str], tensors: FileTensors, source: CheckpointSource, replace_existing: bool
) -> AdapterReport:
    about = {f"wrinklefree.{key}": value for key, value in source.provenance.items()}
    return write_adapter(path, tensors, about=about, replace=replace_existing)


def _vocabulary(source: CheckpointSource, *, keep_mask: bool) -> tuple[int, int | None]:
    """Rows of the embedding in the file, and the row to leave out. Engines decode from left to right and
    have no use for [MASK]; one in the middle stays, so that the others keep their ids.
    """
    rows, diffusion = source.walked.vocab_size, source.record.diffusion
    if diffusion is None or keep_mask or diffusion.mask_token_id != rows - 1:
        return rows, None
    return rows - 1, rows - 1


def _metadata(
    source: CheckpointSource,
    architecture: Architecture,
    body: str,
    padding: Padding,
    text: TokenizerMetadata,
    vocab_size: int,
    name: str | None,
) -> dict[str, MetaValue]:
    in_run = "run_fingerprint" in source.provenance
    directory = source.directory.resolve()
    name = name or (directory.parents[1].name if in_run else "") or directory.name
    metadata: dict[str, MetaValue] = {
        "general.architecture": architecture.name,
        "general.type": "model",
        "general.file_type": FILE_TYPES[body],
        "general.quantization_version": 2,
    }
    if not NAMES_WITH_RULES.search(name):
        metadata["general.name"] = name
    config = padding.pad_config(source.config) if padding.is_needed else source.config
    metadata |= model_metadata(architecture, source.walked, config, source.record, vocab_size=vocab_size)
    metadata |= {f"wrinklefree.{key}": value for key, value in source.provenance.items()}
    return metadata | text.metadata


def _parts(tensors: Iterable[TensorToWrite], body: str) -> tuple[dict[str, str], dict[str, int]]:
    types: dict[str, str] = {}
    num_bytes: dict[str, int] = {}
    for tensor in tensors:
        if tensor.name == "token_embd.weight":
            part = "embeddings"
        elif tensor.name == "output.weight":
            part = "head"
        elif len(tensor.shape) == 2:
            part = "projections" if tensor.format == body else "dense projections"
        else:
            part = "norms and others"
        types[part] = tensor.format
        num_bytes[part] = num_bytes.get(part, 0) + tensor.num_bytes
    return types, num_bytes


def _notes(
    source: CheckpointSource, architecture: Architecture, tensors: FileTensors, prefer: str | None
) -> Iterable[str]:
    if prefer == "size" and tensors.body in DECODE_COST:
        yield f"{tensors.body} is the smallest lossless type here; it {DECODE_COST[tensors.body]}"
    num_dense = len(source.walked.projections) - len(source.record.ternary)
    if num_dense:
        form = tensors.dense_body if tensors.body in TERNARY_FORMATS else tensors.body
        yield f"{num_dense} projections are not ternary in the checkpoint, and {form} here"
    if tensors.without is not None:
        yield f"[MASK] (token {tensors.without}) is left out; --keep-mask keeps it"
    elif source.record.diffusion is not None:
        yield f"[MASK] is token {source.record.diffusion.mask_token_id}"
    if tensors.scale_tensors:
        yield "scales are tensors of their own, exact; engines before 2025 do not read them"
    length = context_length(architecture, source.walked, source.config)
    if length < int(source.config["max_position_embeddings"]):
        yield f"the context ends at {length}: `{architecture.name}` knows no sliding window"
    if not architecture.in_upstream or tensors.body == "i2_s":
        yield "only Microsoft's engine reads it"
