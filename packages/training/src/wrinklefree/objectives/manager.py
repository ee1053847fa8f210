"""One forward, many losses: runs what the active objectives need once, and adds up their weighted means.

    manager.counts(batch) ─► summed by the trainer over micro-batches and ranks ─► total_counts
    manager.step(student, teacher, batch, total_counts).loss.backward()      for every micro-batch

`step` is what training calls: losses over the vocabulary share the products of the head. `losses` and
`combine` give the same in two parts, with a graph for each objective on its own and one pass over the head
for each: for who wants the gradient of a single one. `manager(outputs, batch)` is for who has the logits.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_arch import BlockDiffusion, block_diffusion_of, walk
from data_handler import Batch
from data_handler.types import IGNORED_LABEL
from durable import UserError
from wrinklefree.objectives.base import LossSum, Needs, Objective, check_weight, divided
from wrinklefree.objectives.continue_pretrain import ContinuePretrainObjective
from wrinklefree.objectives.states import DecoderStates, States, decoder_states
from wrinklefree.objectives.views import ViewPlan
from wrinklefree.objectives.vocabulary import VocabularyObjective, vocabulary_losses
from wrinklefree.teachers.base import Teacher, TeacherStates

LARGEST_EXPONENT = 80.0
"""Perplexity is cut at e to this, which float32 still holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerOutput:
    """What one batch gives."""

    loss: Tensor
    """Σ weight · sum / total count, with a graph."""
    losses: dict[str, LossSum]
    """Of this batch, by objective, without a graph."""
    ce_loss: Tensor | None
    """This batch's mean cross entropy; None where it is not computed, or smoothed and so no cross entropy."""

    @property
    def perplexity(self) -> Tensor | None:
        """e to the cross entropy."""
        return None if self.ce_loss is None else self.ce_loss.clamp(max=LARGEST_EXPONENT).exp()


class ObjectiveManager:
    """The objectives of a run with their weights; one whose weight is 0 is not computed at all."""

    def __init__(
        self,
        objectives: Mapping[str, Objective],
        weights: Mapping[str, float] | None = None,
        *,
        plan: ViewPlan | None = None,
    ) -> None:
        """An objective that `weights` does not name has weight 1; `plan` draws the views that some need."""
        self.objectives = dict(objectives)
        self.plan = plan
        self.diffusion: BlockDiffusion | None = None
        """Of the student, once it is known."""
        self.weights = dict.fromkeys(self.objectives, 1.0)
        self.scales: dict[str, float] = {}
        """Beside the weights: what balancing makes of them."""
        self.set_weights(weights or {})

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change the weights of the objectives named."""
        for name, weight in weights.items():
            if name not in self.objectives:
                raise UserError("objectives: a weight for none of them", found=name, choices=self.objectives)
            check_weight(f"objectives.{name}.weight", weight)
        together = self.weights | {name: float(weight) for name, weight in weights.items()}
        require_a_weight([name for name, weight in together.items() if weight], together)
        self.weights = together

    @property
    def active(self) -> dict[str, Objective]:
        """Those with a weight above 0."""
        return {name: objective for name, objective in self.objectives.items() if self.weights[name] > 0}

    def weight_of(self, name: str) -> float:
        """The factor of its mean in the loss."""
        return self.weights[name] * self.scales.get(name, 1.0)

    def needs(self, names: Collection[str] | None = None) -> Needs:
        """What the objectives named need, together; without names, the active ones."""
        chosen = self.active if names is None else names
        return reduce(or_, (self.objectives[name].needs() for name in chosen), Needs())

    @property
    def num_parts(self) -> int:
        """How many times the tokens of a batch go through the student: clean, and in masked views."""
        return 1 + (self.plan.num_views if self.plan is not None and self.needs().masked_views else 0)

    @property
    def reaches_all(self) -> bool:
        """Does every step go through the head, and so through all of the student? Distances between layers
        end before it.
        """
        return all(isinstance(each, VocabularyObjective) for each in self.objectives.values())

    def check_models(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """UserError for two models that an objective cannot compare, before any step."""
        if teacher is None:
            return
        for objective in self.objectives.values():
            objective.check_models(walk(student), walk(teacher))

    def counts(self, batch: Batch) -> dict[str, int]:
        """Tokens of every active objective in a batch, before any forward."""
        return {name: objective.count(batch) for name, objective in self.active.items()}

    def preprocess_batch(self, batch: Any) -> Any:
        """Nothing is masked here: no objective changes the input of another, views are drawn in the forward.

        Of a text that itself holds [MASK] nobody is to predict that.
        """
        if self.diffusion is None or not isinstance(batch, Batch):
            return batch
        is_mask = batch.labels == self.diffusion.mask_token_id
        return replace(batch, labels=batch.labels.masked_fill(is_mask, IGNORED_LABEL))

    def step(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        batch: Batch,
        total_counts: Mapping[str, int],
    ) -> ManagerOutput:
        """Forward and losses of one micro-batch; `total_counts` is of the whole optimizer step."""
        return self._output(self._states(student, teacher, batch), batch, total_counts)

    def losses(self, student: nn.Module, teacher: Teacher | None, batch: Batch) -> dict[str, LossSum]:
        """The same forward, each loss with a graph of its own."""
        states = self._states(student, teacher, batch)
        return {name: objective(states, batch) for name, objective in self.active.items()}

    def combine(self, losses: Mapping[str, LossSum], total_counts: Mapping[str, int]) -> Tensor:
        """Σ weight · sum / total count; where the count is 0, zero with a graph."""
        parts = [
            self.weight_of(name) * divided(loss.total, total_counts[name]) for name, loss in losses.items()
        ]
        return torch.stack(parts).sum()

    def __call__(self, outputs: Any, batch: Any, teacher_outputs: Any = None) -> ManagerOutput:
        """The losses of logits that are there: `outputs.logits` or `outputs["logits"]`, and the same of the
        batch's labels. Means are over this batch.
        """
        self._refuse_looking_inside()
        teacher = None if teacher_outputs is None else _states_of(teacher_outputs)
        self._check_teacher(teacher)
        student = _states_of(outputs)
        batch = _as_batch(batch)
        return self._output(States(student=student, teacher=teacher), batch, self.counts(batch))

    def _states(self, student: nn.Module, teacher: Teacher | None, batch: Batch) -> States:
        self._check_teacher(teacher)
        needs = self.needs()
        diffusion = block_diffusion_of(student)
        excluded = None if diffusion is None else diffusion.mask_token_id
        # The teacher first: what it needs on the way is gone before the student begins to keep activations.
        taught = teacher.states(batch, needs, excluded=excluded) if teacher and needs.teacher else None
        views = None
        if needs.masked_views:
            assert self.plan is not None, "who needs views comes with a plan"
            if diffusion is None:
                raise UserError(
                    "training.diffusion: the model has no [MASK]",
                    "an objective on masked tokens",
                    "start from a model before conversion, or from a checkpoint that was trained with one",
                )
            views = self.plan.draw(batch)
        states = decoder_states(
            student,
            batch,
            views=views,
            plan=self.plan,
            hidden_states=needs.hidden_states,
            relations=needs.relations,
        )
        return States(student=states, teacher=taught, views=views)

    def _refuse_looking_inside(self) -> None:
        for name, objective in self.active.items():
            if objective.needs().needs_inside or objective.needs().masked_views:
                raise UserError(
                    f"objectives.{name}: cannot be computed from logits",
                    found="outputs of a model",
                    fix="let the manager run the model: manager.step(student, teacher, batch, counts)",
                )

    def _check_teacher(self, teacher: Teacher | TeacherStates | None) -> None:
        needing = [name for name, objective in self.active.items() if objective.needs().teacher]
        if needing and teacher is None:
            raise UserError(
                f"objectives.{needing[0]}: needs a teacher",
                found="none",
                fix=f"name a teacher, or set objectives.{needing[0]}.weight to 0",
            )

    def _output(self, states: States, batch: Batch, total_counts: Mapping[str, int]) -> ManagerOutput:
        shares = {name: 1 / total_counts[name] if total_counts[name] else 0.0 for name in self.active}
        factors = {name: self.weight_of(name) * share for name, share in shares.items()}
        shared = {name: part for name, part in self.active.items() if isinstance(part, VocabularyObjective)}
        losses = {name: part(states, batch) for name, part in self.active.items() if name not in shared}
        parts = [loss.total * factors[name] for name, loss in losses.items()]
        if shared:
            together, sums = vocabulary_losses(
                list(shared.values()), states, batch, factors=[factors[name] for name in shared]
            )
            parts.append(together)
            counts = self.counts(batch)
            losses |= {
                name: LossSum(total, counts[name]) for name, total in zip(shared, sums.unbind(), strict=True)
            }
        detached = {name: LossSum(losses[name].total.detach(), losses[name].count) for name in self.active}
        return ManagerOutput(
            loss=torch.stack(parts).sum(), losses=detached, ce_loss=self._cross_entropy(detached)
        )

    def _cross_entropy(self, losses: Mapping[str, LossSum]) -> Tensor | None:
        for name, loss in losses.items():
            objective = self.objectives[name]
            if isinstance(objective, ContinuePretrainObjective) and not objective.label_smoothing:
                return loss.mean()
        return None


def require_a_weight(wanted: Collection[str], named: Iterable[str]) -> None:
    """UserError when none of the objectives named is wanted."""
    if not wanted:
        raise UserError(
            "objectives: all weights are 0, nothing would be trained",
            found=", ".join(named) or "no objective",
            fix="give one of them a weight above 0",
        )


def _entry(outputs: Any, name: str) -> Tensor | None:
    """Of a mapping, or of an object with attributes; transformers' outputs are both."""
    found: Tensor | None = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
    return found


def _states_of(outputs: Any) -> DecoderStates:
    logits_BTV = _entry(outputs, "logits")
    if logits_BTV is None:
        raise UserError("manager: these outputs have no logits", found=type(outputs).__name__)
    return DecoderStates.from_logits(logits_BTV)


def _as_batch(batch: Any) -> Batch:
    """A typed batch; of a dictionary only `labels` matters once the model has run."""
    if isinstance(batch, Batch):
        return batch
    labels_BT = _entry(batch, "labels")
    if labels_BT is None:
        raise UserError("manager: this batch has no labels", found=type(batch).__name__)
    places_BT = torch.arange(labels_BT.shape[1], device=labels_BT.device).expand_as(labels_BT)
    return Batch(
        input_ids=labels_BT,
        labels=labels_BT,
        position_ids=places_BT,
        document_ids=torch.zeros_like(places_BT),
        source_id=torch.zeros_like(labels_BT[:, 0]),
        sample_id=torch.arange(len(labels_BT), device=labels_BT.device),
    )
