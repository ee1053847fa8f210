"""Relations among the queries of one layer, among its keys, and among its values (BitDistill, 2510.13998).

    A ∈ {Q, K, V}, its channels in G groups of d (`split_heads`)       R = softmax(A Aᵀ, scaled), row by row
    Σ_A 1 / G Σ_groups KL(R of the teacher ‖ R of the student)         for each token, which is a row

Three scalings go by the paper's name, and the weight γ of the loss belongs to one of them:

    paper    A Aᵀ / √d, its equation 12
    cosine   Â Âᵀ / τ, Â = A of length 1 in each group: its algorithm 1
    code     as `cosine`, and the sum is divided by G once more: the released code

Rows of `cosine` are almost even: noise of a third of the signal makes KL 1e-3 there, 3e-2 with `paper`, and
with `code` 1 / G of the former, for which the published γ = 1e5 makes up and nothing else. Unlike the
released code we compare only what may look at each other: a row holds the tokens of its own document up to
itself. (A sliding window is not looked at: relations are of tokens, not of who attends.)

Student and teacher may have different numbers of heads and channels; G must divide those of both. Rows are
computed a part at a time and once more for the gradient, so no more than a part of T × T is alive.

Shapes: B samples, H heads, G groups, T tokens, R rows of a part, D size of a head or group.
"""

import math
from collections.abc import Iterator
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from durable import UserError
from wrinklefree.objectives.head import accurate
from wrinklefree.objectives.vocabulary import chunks

PART_ELEMENTS = {"cpu": 2**22}
"""Of a part of T × T, by device type: 16 MiB of float32, of which a handful are alive."""
PART_ELEMENTS_OTHERWISE = 2**26


class Normalization(StrEnum):
    """How A Aᵀ is scaled, and its loss."""

    paper = "paper"
    cosine = "cosine"
    code = "code"


def relation_divergence(
    student_BHTD: Tensor,
    teacher_BHTD: Tensor,
    document_ids_BT: Tensor,
    wanted_BT: Tensor,
    *,
    num_groups: int,
    normalization: Normalization,
    temperature: float,
) -> Tensor:
    """The sum over the wanted rows, for one of queries, keys and values."""
    student, teacher = (
        _prepared(each, num_groups, normalization, temperature) for each in (student_BHTD, teacher_BHTD)
    )
    total = student.new_zeros(())
    for samples, rows in _parts(student):
        total = total + checkpoint(
            _part_divergence,
            student[samples],
            teacher[samples],
            document_ids_BT[samples],
            wanted_BT[samples],
            rows,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return total / num_groups**2 if normalization is Normalization.code else total / num_groups


def groups_of(
    student: tuple[int, int], teacher: tuple[int, int], split_heads: int | None, *, name: str
) -> int:
    """G for channels of (heads, size of a head) in both: their heads, or what a person wants."""
    if split_heads is None:
        if student[0] != teacher[0]:
            raise UserError(
                f"objectives.{name}.split_heads: student and teacher have different numbers of heads",
                f"{student[0]} and {teacher[0]}",
                f"give a number that divides {_channels(student)} and {_channels(teacher)} channels",
            )
        return student[0]
    for whose, shape in (("student", student), ("teacher", teacher)):
        if _channels(shape) % split_heads:
            raise UserError(
                f"objectives.{name}.split_heads: does not divide the {whose}'s channels",
                f"{split_heads}, {_channels(shape)} channels",
                f"give a divisor of {math.gcd(_channels(student), _channels(teacher))}",
            )
    return split_heads


def _channels(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _prepared(
    heads_BHTD: Tensor, num_groups: int, normalization: Normalization, temperature: float
) -> Tensor:
    """[B, G, T, D]: channels regrouped, and scaled so that the product of two is what softmax takes."""
    num_samples, _, length, _ = heads_BHTD.shape
    flat = heads_BHTD.transpose(1, 2).reshape(num_samples, length, num_groups, -1).transpose(1, 2)
    flat = flat.to(accurate(flat.dtype))
    if normalization is Normalization.paper:
        return flat / math.sqrt(math.sqrt(flat.shape[-1]) * temperature)
    return F.normalize(flat, dim=-1, eps=1e-6) / math.sqrt(temperature)


def _part_divergence(
    student_BGTD: Tensor, teacher_BGTD: Tensor, document_ids_BT: Tensor, wanted_BT: Tensor, rows: slice
) -> Tensor:
    """The sum over these rows, which see nothing behind their last."""
    place_T = torch.arange(rows.stop, device=document_ids_BT.device)
    document_BK = document_ids_BT[:, : rows.stop]
    seen_BRK = (document_BK[:, rows, None] == document_BK[:, None, :]) & (place_T[rows, None] >= place_T)
    hidden = ~seen_BRK[:, None]
    log_student, log_teacher = (
        _scores(each, rows).masked_fill(hidden, -torch.inf).log_softmax(dim=-1)
        for each in (student_BGTD, teacher_BGTD)
    )
    # Hidden pairs would be 0 · (−∞ − −∞).
    difference = (log_teacher - log_student).masked_fill(hidden, 0)
    kl_BR = (log_teacher.exp() * difference).sum(dim=(1, 3))
    return (kl_BR * wanted_BT[:, rows]).sum()


def _scores(prepared_BGTD: Tensor, rows: slice) -> Tensor:
    with torch.autocast(prepared_BGTD.device.type, enabled=False):
        return prepared_BGTD[:, :, rows] @ prepared_BGTD[:, :, : rows.stop].transpose(-1, -2)


def _parts(prepared_BGTD: Tensor) -> Iterator[tuple[slice, slice]]:
    """Samples and rows, so that a part of T × T is bounded."""
    num_samples, num_groups, length, _ = prepared_BGTD.shape
    elements = PART_ELEMENTS.get(prepared_BGTD.device.type, PART_ELEMENTS_OTHERWISE)
    num_rows = max(1, min(length, elements // (num_groups * length)))
    for samples in chunks(num_samples, max(1, elements // (num_groups * num_rows * length))):
        for rows in chunks(length, num_rows):
            yield samples, rows
