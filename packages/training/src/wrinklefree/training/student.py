"""The model that is trained, the teacher that it may imitate, and their tokenizer."""

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitnet_arch import (
    BlockDiffusion,
    ConversionConfig,
    LRCInit,
    add_mask_token,
    block_diffusion_of,
    check_mask_token,
    convert_bitlinear_to_lrc,
    convert_to_bitnet,
    freeze_model_except_lrc,
    load_bitnet,
    set_block_diffusion,
    set_quant_amount,
    set_subln_amount,
    start_mask_at_mean,
)
from bitnet_arch.checkpoint import open_checkpoint, read_tensors
from bitnet_arch.lrc import lrc_layers
from data_handler.demo import TOKENIZER_DIR
from durable import ExitCode, UserError
from wrinklefree.config.schema import LRCConfig, ModelConfig, RunConfig
from wrinklefree.objectives.base import Needs
from wrinklefree.objectives.diffusion import DiffusionConfig
from wrinklefree.pretrained import Pretrained, load_pretrained
from wrinklefree.teachers.base import Teacher
from wrinklefree.teachers.opening import open_teacher, teacher_name
from wrinklefree.training.compiling import compile_blocks
from wrinklefree.training.exporting import choose_subln, require_exportable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Models:
    """Who learns, and from whom."""

    student: PreTrainedModel
    teacher: Teacher | None
    tokenizer: PreTrainedTokenizerBase | None


def build_models(
    config: RunConfig,
    *,
    checkpoint: Path | None,
    takes_what_fits: bool = False,
    needs: Needs,
    calibration: Iterable[Tensor],
    sources: Mapping[str, Mapping[str, str]] | None = None,
) -> Models:
    """From the pretrained model, or the student from a checkpoint of an earlier run.

    The pretrained model is opened only when someone needs it: a student to convert, or a teacher. With
    `takes_what_fits` it is converted, and gets the weights of the checkpoint that it has a place for.
    `sources` says what the data was made from, for a teacher whose answers are kept.
    """
    from_pretrained = checkpoint is None or takes_what_fits
    wanted = config.training.teacher
    # With a cache the teacher is opened when something is not there.
    teacher_is_student = needs.teacher and wanted.knows_inside and wanted.pretrained_name is None
    pretrained: Pretrained | None = None
    if from_pretrained or teacher_is_student:
        pretrained = load_pretrained(config.model.pretrained_name)
    original = _copy_of(pretrained) if teacher_is_student else None
    if from_pretrained:
        assert pretrained is not None
        student = pretrained.model
        # fp32 while it learns: AdamW's small steps are lost in bf16. The file may hold bf16.
        student = student.float()
    else:
        assert checkpoint is not None
        student = load_bitnet(checkpoint)
    _set_dropout(student, config.model)
    tokenizer = load_tokenizer(config.model, pretrained, checkpoint)
    if needs.masked_views:
        prepare_mask(student, tokenizer, config.training.diffusion)
    if from_pretrained:
        _convert(student, config, calibration)
        if checkpoint is not None:
            load_what_fits(student, checkpoint)
    require_exportable(student, config)
    if config.training.lrc.enabled:
        _correct(student, config.training.lrc, calibration, is_trained=not from_pretrained)
    teacher = None
    if needs.teacher:

        def load() -> PreTrainedModel:
            if original is not None:
                return original
            other = load_pretrained(teacher_name(config))
            if wanted.pretrained_name is not None:
                check_teacher(other.model, other.tokenizer, student, tokenizer)
            return other.model

        teacher = open_teacher(config, student=student, tokenizer=tokenizer, load=load, sources=sources)
    check_length(student, config)
    if config.training.torch_compile.enabled:
        compile_blocks(student)
    student.train()  # models are opened for evaluation, which leaves dropout out
    return Models(student, teacher, tokenizer)


def tokenizer_name(model: ModelConfig) -> str:
    """What data_handler is given to prepare with."""
    return model.tokenizer or model.pretrained_name


def load_tokenizer(
    model: ModelConfig, pretrained: Pretrained | None, checkpoint: Path | None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that checkpoints keep beside the model."""
    from transformers import AutoTokenizer

    if model.tokenizer == "demo":
        source: Any = TOKENIZER_DIR
    elif checkpoint is not None and (checkpoint / "tokenizer.json").is_file():
        source = checkpoint
    elif pretrained is not None and model.tokenizer is None:
        return pretrained.tokenizer
    elif model.tokenizer is not None:
        source = model.tokenizer
    else:
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    return tokenizer


def prepare_mask(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, config: DiffusionConfig
) -> None:
    """Give the model a [MASK], if it was not trained with one: then its embedding stays as it is."""
    known = block_diffusion_of(student)
    wanted = config.mask_token_id
    if known is not None:
        if wanted not in (None, known.mask_token_id):
            raise UserError(
                "training.diffusion.mask_token_id: the model was trained with another [MASK]",
                f"{wanted}, the model has {known.mask_token_id}",
                "leave it out",
            )
        mask = known.mask_token_id
    else:
        if wanted is not None:
            check_mask_token(student, wanted)
            _refuse_text(wanted, tokenizer)
            how = "as training.diffusion.mask_token_id says"
        elif tokenizer is not None and tokenizer.mask_token_id is not None:
            wanted, how = int(tokenizer.mask_token_id), "the tokenizer's"
        else:
            how = "a row added behind the vocabulary"
        if wanted is None:
            mask = add_mask_token(student)
        else:
            mask = wanted
            start_mask_at_mean(student, mask)
        logger.info("[MASK] is token %d, %s; its embedding starts at the vocabulary's mean", mask, how)
    set_block_diffusion(student, BlockDiffusion(mask_token_id=mask, block_size=config.block_size))
    if student.generation_config is not None:
        suppressed = student.generation_config.suppress_tokens or ()
        student.generation_config.suppress_tokens = sorted({*suppressed, mask})


def _refuse_text(mask_token_id: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """A token that texts are made of, or end with, cannot be [MASK]."""
    if tokenizer is None or mask_token_id >= len(tokenizer):
        return
    if mask_token_id in tokenizer.all_special_ids and mask_token_id != tokenizer.eos_token_id:
        return
    raise UserError(
        "training.diffusion.mask_token_id: is a token of the text",
        f"{mask_token_id}, that is {tokenizer.convert_ids_to_tokens(mask_token_id)!r}",
        "leave it out: the tokenizer's [MASK] is taken, or a row is added",
    )


def check_length(model: PreTrainedModel, config: RunConfig) -> None:
    """Blocks must fit the positions that the model has."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and config.training.max_seq_length > longest:
        raise UserError(
            "training.max_seq_length: longer than the model's positions",
            f"{config.training.max_seq_length}, the model has {longest}",
            f"give {longest} or less",
        )


def check_teacher(
    teacher: PreTrainedModel,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Both must mean the same by a token; the student may have more rows at its end, [MASK] for one."""
    key = "training.teacher.pretrained_name"
    fix = "choose a teacher with the student's tokenizer"
    if tokenizer is not None and teacher_tokenizer is not None:
        ids, teacher_ids = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
        first = _first_difference(ids, teacher_ids, mask=tokenizer.mask_token)
        if first is not None:
            found = f"{first}; {len(teacher_ids)} tokens, the student has {len(ids)}"
            raise UserError(f"{key}: has another tokenizer than the student", found, fix, ExitCode.BAD_DATA)
        fits = teacher.config.vocab_size <= student.config.vocab_size
    else:
        fits = teacher.config.vocab_size == student.config.vocab_size
    if not fits:
        found = f"{teacher.config.vocab_size}, the student has {student.config.vocab_size}"
        raise UserError(f"{key}: has another vocabulary than the student", found, fix, ExitCode.BAD_DATA)


def _first_difference(
    ids: Mapping[str, int], teacher_ids: Mapping[str, int], *, mask: str | None
) -> str | None:
    """The first id that is another text for the teacher; [MASK] is the student's own affair."""
    texts = {number: token for token, number in ids.items() if token != mask}
    taught = {number: token for token, number in teacher_ids.items() if token != mask}
    for number in sorted(texts.keys() | taught.keys()):
        ours, theirs = texts.get(number), taught.get(number)
        if ours != theirs:
            ours, theirs = ("none" if token is None else repr(token) for token in (ours, theirs))
            return f"token {number} is {theirs}, the student's is {ours}"
    return None


def load_what_fits(student: PreTrainedModel, checkpoint: Path) -> None:
    """The tensors of a checkpoint that the model has under the same name and shape; prints the others."""
    tensors = read_tensors(*open_checkpoint(checkpoint))
    places = student.state_dict()
    fitting = {
        name: tensor
        for name, tensor in tensors.items()
        if name in places and places[name].shape == tensor.shape
    }
    if not fitting:
        raise UserError(
            f"{checkpoint}: not one tensor fits the model",
            f"{len(tensors)} tensors",
            "choose the model that it was trained from",
            ExitCode.BAD_DATA,
        )
    student.load_state_dict(fitting, strict=False)
    filled = {places[name].data_ptr() for name in fitting}  # of tied weights, one name is enough
    missing = [name for name, place in places.items() if place.data_ptr() not in filled]
    unexpected = [name for name in tensors if name not in fitting]
    for what, names in (("not in the checkpoint, left as they were", missing), ("have no place", unexpected)):
        if names:
            print(f"strict_model_load=false: {len(names)} tensors {what}: {', '.join(names)}", flush=True)


def _copy_of(pretrained: Pretrained | None) -> PreTrainedModel:
    assert pretrained is not None
    return copy.deepcopy(pretrained.model)


def _convert(student: PreTrainedModel, config: RunConfig, calibration: Iterable[Tensor]) -> None:
    wanted = config.training.auto_convert
    subln = choose_subln(student, wanted.subln)
    needs_batches = wanted.subln_init == "calibrated" and subln != "none"
    report = convert_to_bitnet(
        student,
        ConversionConfig(
            exclude=tuple(wanted.exclude_layers),
            subln=subln,
            subln_init=wanted.subln_init if needs_batches else "ones",
            calibration_batches=calibration if needs_batches else None,
        ),
    )
    logger.info("converted %d projections to ternary", len(report.converted))


def _correct(
    student: PreTrainedModel, config: LRCConfig, calibration: Iterable[Tensor], *, is_trained: bool
) -> None:
    """Give every ternary projection a low-rank correction, unless it came with one, and freeze the rest."""
    if not any(lrc_layers(student)):
        # What is corrected is the ternary model, whatever the checkpoint's λ and μ were.
        set_quant_amount(student, 1.0)
        set_subln_amount(student, 1.0)
        init = config.init or (LRCInit.kaiming if is_trained else LRCInit.calibrated)
        batches = calibration if init is LRCInit.calibrated else None
        convert_bitlinear_to_lrc(student, config.rank, config.rank_percentage, init, batches=batches)
        logger.info("low-rank correction: starts %s", init)
    counts = freeze_model_except_lrc(student)
    logger.info("low-rank correction: %s parameters learn, all others are frozen", f"{counts['trainable']:,}")


def _set_dropout(model: PreTrainedModel, config: ModelConfig) -> None:
    """In the configuration, and in the layers that read it when they were built."""
    if config.attention_dropout is None:
        return
    model.config.attention_dropout = config.attention_dropout
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", config.attention_dropout)  # noqa: B010 - a module has no such type


def count_parameters(model: torch.nn.Module) -> int:
    """Tied weights once."""
    return sum(parameter.numel() for parameter in model.parameters())
