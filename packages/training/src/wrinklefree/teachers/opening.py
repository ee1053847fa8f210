"""Which teacher a configuration means: here or behind a server, asked each time or kept in a cache."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitnet_arch import block_diffusion_of
from wrinklefree.config.schema import RunConfig, TeacherBackend, TeacherDtype
from wrinklefree.pretrained import described_by
from wrinklefree.teachers.base import Teacher
from wrinklefree.teachers.cached import CachedTeacher
from wrinklefree.teachers.identity import TeacherIdentity, weights_fingerprint
from wrinklefree.teachers.local import LocalTeacher
from wrinklefree.teachers.store import TeacherStore
from wrinklefree.teachers.vllm import open_server, open_vllm, served_model


def teacher_name(config: RunConfig) -> str:
    """Of a teacher that runs here."""
    return config.training.teacher.pretrained_name or config.model.pretrained_name


def teacher_dtype(config: RunConfig) -> torch.dtype:
    """Of a teacher that runs here."""
    wanted = config.training.teacher.dtype
    chosen = config.training.precision.value if wanted is TeacherDtype.auto else wanted.value
    return torch.float32 if chosen == "fp32" else torch.bfloat16


def open_teacher(
    config: RunConfig,
    *,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    load: Callable[[], PreTrainedModel],
    sources: Mapping[str, Mapping[str, str]] | None = None,
) -> Teacher:
    """`load` gives the model of a teacher that runs here; with a cache, only once it is asked something.

    `sources` is what the data was made from (`PreparedData.fingerprints`). [MASK] is known by now.
    """
    wanted = config.training.teacher
    is_local = wanted.backend is TeacherBackend.local
    num_rows = student.config.vocab_size
    if is_local and wanted.cache is not None:
        num_rows = described_by(teacher_name(config)).vocab_size
    diffusion = block_diffusion_of(student)
    excluded = None if diffusion is None or diffusion.mask_token_id >= num_rows else diffusion.mask_token_id
    vocab_size = num_rows - (excluded == num_rows - 1)
    if not is_local and tokenizer is not None and excluded is not None and excluded >= len(tokenizer):
        excluded = None  # a row that was added: the server has none, or one that nothing ever was

    def open_it() -> Teacher:
        if is_local:
            return LocalTeacher(load(), dtype=teacher_dtype(config))
        length = config.training.max_seq_length
        return open_vllm(wanted, vocab_size=vocab_size, excluded=excluded, tokenizer=tokenizer, length=length)

    if wanted.cache is None:
        return open_it()
    sources = sources or {}
    store = TeacherStore(
        Path(wanted.cache).expanduser(),
        _identity(config, vocab_size, excluded, sources),
        length=config.training.max_seq_length,
        sources={name: each["documents"] for name, each in sources.items()},
    )

    def open_known() -> Teacher:
        teacher = open_it()
        if is_local and store.identity.weights is None:  # they may have been fetched just now
            store.identity = replace(store.identity, weights=weights_fingerprint(teacher_name(config)))
            store.require_same()
        return teacher

    return CachedTeacher(store, open_known)


def _identity(
    config: RunConfig, vocab_size: int, excluded: int | None, sources: Mapping[str, Mapping[str, str]]
) -> TeacherIdentity:
    wanted = config.training.teacher
    if wanted.backend is TeacherBackend.vllm:
        name, weights, dtype = wanted.model, None, "the server's"
        if name is None:
            server = open_server(wanted)
            name, _ = served_model(server, None)
            server.close()
    else:
        name = teacher_name(config)
        weights, dtype = weights_fingerprint(name), str(teacher_dtype(config)).removeprefix("torch.")
    return TeacherIdentity(
        backend=wanted.backend.value,
        name=name,
        weights=weights,
        dtype=dtype,
        tokenizer=next((each["tokenizer"] for each in sources.values()), None),
        vocab_size=vocab_size,
        excluded=excluded,
        top_k=min(wanted.top_k, vocab_size),
        stored_as=wanted.cache_dtype.value,
    )
