"""Does a GGUF file say what a checkpoint says? Every code, scale, gain and number of the metadata.

The file is decoded by our own reader, and the result compared with the checkpoint's tensors:

    ternary weights      codes are equal, scales differ by at most 2⁻¹¹ (an fp16 number's rounding)
    embedding and head   values differ by at most what their type rounds
    gains, biases        values are equal
    metadata             equals `config.json`, after padding where there is any

Names of places and the way to pad are those of the exporter; what they do to a model, the engine shows.

Shapes: weight and codes [N, K].
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bitnet_serving.architectures import (
    ARCHITECTURES,
    PROJECTION_ROLES,
    Architecture,
    ModelTraits,
    Place,
    choose_architecture,
    places,
)
from bitnet_serving.checkpoint_source import CheckpointSource
from bitnet_serving.encoding import decode_dense, decode_ternary
from bitnet_serving.export import plan_for
from bitnet_serving.file_tensors import LARGEST_SCALE_ERROR, FileTensors
from bitnet_serving.formats import DENSE_FORMATS, TERNARY_FORMATS
from bitnet_serving.gguf_reader import GGUFFile
from bitnet_serving.gguf_values import MetaValue
from bitnet_serving.model_metadata import rope_factors, rope_parameters
from bitnet_serving.reference import Tables
from durable import ExitCode, UserError

EMBEDDING = "token_embd.weight"
ROPE_FACTORS = "rope_freqs.weight"
RELATIVE_ROUNDING = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8}
"""Of half a step, relative to the value; q8_0 has steps of its own."""
SMALLEST_F16 = 2.0**-25
"""Half a step of numbers too small for fp16's exponents."""


@dataclass(slots=True)
class FileCheck:
    """What was compared, and all that was wrong."""

    tensors: FileTensors
    """What the file should hold, for the types that it has."""
    num_tensors: int = 0
    num_codes: int = 0
    num_metadata: int = 0
    largest_scale_error: float = 0.0
    problems: dict[str, list[str]] = field(default_factory=dict)
    """architecture, metadata, tensors, codes, scales, values → a line each."""

    @property
    def architecture(self) -> Architecture:
        return self.tensors.architecture

    @property
    def body(self) -> str:
        """Type of the ternary projections."""
        return self.tensors.body

    def add(self, kind: str, line: str) -> None:
        """Note a problem."""
        self.problems.setdefault(kind, []).append(line)


def check_file(file: GGUFFile, source: CheckpointSource, *, has_adapter: bool) -> FileCheck:
    """Compare the whole file with the checkpoint. `has_adapter`: corrections are in a file of their own."""
    name = str(file.metadata.get("general.architecture"))
    if name not in ARCHITECTURES or EMBEDDING not in file.tensors:
        raise UserError(
            f"{file.path}: no model that this package writes",
            found=f"architecture {name}" if name not in ARCHITECTURES else f"no {EMBEDDING}",
            fix="name a file that `wrinklefree export gguf` wrote",
            exit_code=ExitCode.BAD_DATA,
        )
    tensors = _tensors_of(file, source, ARCHITECTURES[name], has_adapter=has_adapter)
    check = FileCheck(tensors)
    _check_architecture(check, source)
    _check_metadata(check, file, tensors)
    missing = _check_presence(check, file, tensors)
    for place in places(source.walked, source.stored.keys()):
        if place.gguf_name not in missing:
            try:
                _check_tensor(check, file, tensors, place)
            except UserError as error:  # bytes that stand for nothing
                check.add("codes", f"{place.gguf_name}: {error.problem}")
    factors = rope_factors(source.config, source.walked.head_dim)
    is_comparable = factors is not None and ROPE_FACTORS not in missing
    if is_comparable and not torch.equal(_dense(file, ROPE_FACTORS)[0], torch.tensor(factors)):
        check.add("values", f"{ROPE_FACTORS} differs from config.json")
    return check


def stored_tables(file: GGUFFile, tensors: FileTensors) -> Tables:
    """Embedding and head of a file, in the model's own width."""
    embedding, head = (
        _dense(file, f"{role}.weight")[:, : tensors.padding.shape.hidden] / tensors.padding.factor(role)
        for role in ("token_embd", "token_embd" if tensors.source.walked.is_tied else "output")
    )
    return Tables(embedding=embedding, head=head, rounds_input=tensors.head == "q8_0")


def _tensors_of(
    file: GGUFFile, source: CheckpointSource, architecture: Architecture, *, has_adapter: bool
) -> FileTensors:
    def type_of(gguf_name: str) -> str:
        tensor = file.tensors.get(gguf_name)
        return "f32" if tensor is None else tensor.block_format.name

    ternary = [
        place
        for place in places(source.walked, source.stored.keys())
        if place.kind == "weight" and place.module in source.record.ternary
    ]
    body, embeddings = type_of(ternary[0].gguf_name), type_of(EMBEDDING)
    head = embeddings if source.walked.is_tied else type_of("output.weight")
    for form in (body, embeddings, head):
        if form not in {**TERNARY_FORMATS, **DENSE_FORMATS}:
            raise UserError(
                f"{file.path}: a type that loses what ternary weights say",
                found=form,
                fix=f"export it as one of {', '.join(TERNARY_FORMATS)}, {', '.join(DENSE_FORMATS)}",
                exit_code=ExitCode.BAD_DATA,
            )
    vocab_size = source.walked.vocab_size
    diffusion = source.record.diffusion
    # [MASK] may be left out where it is the last.
    mask = diffusion.mask_token_id if diffusion is not None else None
    is_dropped = mask == vocab_size - 1 and file.tensors[EMBEDDING].shape[0] == vocab_size - 1
    return FileTensors(
        source=source,
        architecture=architecture,
        padding=plan_for(source, body, embeddings, head),
        body=body,
        dense_body="f16",
        embeddings=embeddings,
        head=head,
        vocab_size=vocab_size - is_dropped,
        without=vocab_size - 1 if is_dropped else None,
        scale_tensors=ternary[0].with_leaf("scale") in file.tensors,
        merge_lrc=bool(source.record.lrc) and body in DENSE_FORMATS and not has_adapter,
    )


def _check_architecture(check: FileCheck, source: CheckpointSource) -> None:
    """The graph that computes this model, its activation above all."""
    traits = ModelTraits.of(source.walked, normed=source.normed, tensor_names=source.stored.keys())
    try:
        expected = choose_architecture(traits)
    except UserError as error:
        check.add("architecture", error.problem)
        return
    if expected != check.architecture:
        check.add("architecture", f"{check.architecture.name} where this model needs {expected.name}")


def _check_metadata(check: FileCheck, file: GGUFFile, tensors: FileTensors) -> None:
    for key, expected in _expected_metadata(check.architecture.name, tensors).items():
        check.num_metadata += 1
        found = file.metadata.get(key)
        as_stored = float(torch.tensor(expected)) if isinstance(expected, float) else expected
        if found != as_stored or type(found) is not type(as_stored):
            check.add("metadata", f"{key} is {found} and must be {as_stored}")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    num_tokens = len(tokens) if isinstance(tokens, list) else 0
    if num_tokens != tensors.vocab_size:
        check.add("metadata", f"{num_tokens} tokens for {tensors.vocab_size} rows of the embedding")


def _expected_metadata(arch: str, tensors: FileTensors) -> dict[str, MetaValue | None]:
    """Straight from `config.json`: nothing here comes from what the exporter wrote."""
    config, padded = tensors.source.config, tensors.padding.padded
    rope: Mapping[str, Any] = rope_parameters(config)["full_attention"]
    expected: dict[str, MetaValue | None] = {
        "embedding_length": padded.hidden,
        "feed_forward_length": padded.ffn,
        "block_count": config["num_hidden_layers"],
        "attention.head_count": padded.heads,
        "attention.head_count_kv": padded.kv_heads,
        "attention.key_length": padded.head_dim,
        "attention.value_length": padded.head_dim,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"] * tensors.padding.eps_factor,
        "rope.dimension_count": padded.head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.scaling.type": "linear" if rope.get("rope_type") == "linear" else None,
        "rope.scaling.factor": float(rope["factor"]) if rope.get("rope_type") == "linear" else None,
    }
    if arch == "gemma3":
        slides = "sliding_attention" in config["layer_types"]
        local = rope_parameters(config).get("sliding_attention", {})
        expected["attention.sliding_window"] = config["sliding_window"] if slides else None
        expected["rope.freq_base_swa"] = float(local["rope_theta"]) if slides else None
    return {f"{arch}.{key}": value for key, value in expected.items()}


def _check_presence(check: FileCheck, file: GGUFFile, tensors: FileTensors) -> set[str]:
    """Names and shapes. Returns those that cannot be compared."""
    expected = {tensor.name: tensor.shape for tensor in tensors.listed()}
    check.num_tensors = len(expected)
    for name in sorted(file.tensors.keys() - expected.keys()):
        check.add("tensors", f"{name} does not belong to this model")
    unusable: set[str] = set()
    for name, shape in expected.items():
        found = file.tensors.get(name)
        if found is None or found.shape != shape:
            check.add("tensors", f"{name} is {found.shape if found else 'missing'} and must be {shape}")
            unusable.add(name)
    return unusable


def _check_tensor(check: FileCheck, file: GGUFFile, tensors: FileTensors, place: Place) -> None:
    is_ternary = place.kind == "weight" and place.module in tensors.source.record.ternary
    merged = tensors.merge_lrc and place.module in tensors.source.record.lrc
    if is_ternary and not merged:
        _check_ternary(check, file, tensors, place)
        return
    form = file.tensors[place.gguf_name].block_format.name
    if form not in DENSE_FORMATS:
        check.add("values", f"{place.gguf_name} is {form}, and its values are not ternary")
        return
    values = _dense(file, place.gguf_name)
    expected = tensors.padding.apply(place.role, _expected_dense(tensors, place), place.kind)
    if not _is_rounded(form, values.view(expected.shape), expected):
        check.add("values", f"{place.gguf_name} differs from the checkpoint")


def _check_ternary(check: FileCheck, file: GGUFFile, tensors: FileTensors, place: Place) -> None:
    name = place.gguf_name
    codes, scale = tensors.source.ternary(place.module)
    codes = tensors.padding.widen(place.role, tensors.in_order(place, codes))
    expected_scale = float(scale) * tensors.padding.factor(place.role)
    found_codes, found_scales = _ternary(file, name)
    if tensors.scale_tensors:
        apart = _dense(file, place.with_leaf("scale")) if place.with_leaf("scale") in file.tensors else None
        found_scales = found_scales * (float("nan") if apart is None else float(apart))
    check.num_codes += codes.numel()
    if num_wrong := int((found_codes != codes).sum()):
        check.add("codes", f"{name}: {num_wrong:,} of {codes.numel():,} codes differ")
    error = float((found_scales.double() / expected_scale - 1).abs().max())
    check.largest_scale_error = max(check.largest_scale_error, error)
    # NaN is no error that is small enough.
    if not error <= LARGEST_SCALE_ERROR * 1.001:
        check.add("scales", f"{name}: {float(found_scales.flatten()[0]):.6g} for {expected_scale:.6g}")


def _ternary(file: GGUFFile, name: str) -> tuple[Tensor, Tensor]:
    """Codes and all scales, from whatever type; plain numbers are ± one scale, or are no codes."""
    tensor = file.tensors[name]
    if tensor.block_format.name in TERNARY_FORMATS:
        return decode_ternary(tensor.block_format.name, file.data(name), *tensor.shape)
    values = _dense(file, name)
    scales = values.abs()[values != 0]
    return values.sign().to(torch.int8), scales if scales.numel() else torch.ones(1)


def _dense(file: GGUFFile, name: str) -> Tensor:
    """As a matrix."""
    tensor = file.tensors[name]
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    return decode_dense(tensor.block_format.name, file.data(name), rows, tensor.shape[-1])


def _expected_dense(tensors: FileTensors, place: Place) -> Tensor:
    source = tensors.source
    values = source.dense(place.name).float()
    if place.kind == "weight" and place.module in source.record.ternary:
        values = source.ternary(place.module).value()
        up, down = (source.dense(f"{place.module}.lrc_{name}").float() for name in "UV")
        values = values + up @ down.t()
    if place.role in ("token_embd", "output"):
        return values[: tensors.vocab_size]
    if place.role not in PROJECTION_ROLES.values():
        values = values + source.walked.gain_offset
    return tensors.in_order(place, values)


def _is_rounded(form: str, found: Tensor, exact: Tensor) -> bool:
    """Is every value the nearest that the type has, or next to that for what arithmetic in fp32 loses?"""
    if form == "q8_0":
        blocks = exact.reshape(-1, 32)
        # Half a step, and what the rounding of the step to fp16 does to 127 of them.
        allowed = blocks.abs().amax(-1, keepdim=True) / 127 * (0.5 + 127 * 2.0**-11) * 1.001 + 1e-9
        return bool(((found.reshape(-1, 32) - blocks).abs() <= allowed).all())
    slack = RELATIVE_ROUNDING[form] + 2.0**-22
    floor = SMALLEST_F16 if form == "f16" else 0.0
    return bool(((found - exact).abs() <= exact.abs() * slack + floor).all())
