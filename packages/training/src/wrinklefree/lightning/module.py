"""One optimizer step: every micro-batch forward and backward, one look at the numbers, one update.

    counts of all micro-batches and ranks ─► for each micro-batch: seed, forward, Σ w·sum/count, backward
        ─► one host read: losses, norm, signals ─► finite? ─► clip, step ─► report

Losses are divided by the step's total counts, known before the first backward, so 1 × 8, 2 × 4 and 8 × 1
micro-batches, and 1 or 2 ranks, give the same gradient. Callbacks read `report` after the step.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitnet_arch import block_diffusion_of
from data_handler import Batch
from wrinklefree.config import RunConfig
from wrinklefree.lightning.datamodule import WrinkleFreeDataModule
from wrinklefree.objectives.manager import ObjectiveManager
from wrinklefree.optimizers.build import build_optimizer
from wrinklefree.optimizers.config import (
    GradientClippingConfig,
    OptimizerConfig,
    OptimizerType,
    SchedulerConfig,
)
from wrinklefree.optimizers.qk_clip import QKClip
from wrinklefree.optimizers.schedule import apply_schedule, learning_rate_factor, weight_decay_at
from wrinklefree.optimizers.zclip import Clipped, ZClip
from wrinklefree.teachers.base import Teacher
from wrinklefree.teachers.local import LocalTeacher
from wrinklefree.training.randomness import seed_micro_batch
from wrinklefree.training.signals import StopFlag
from wrinklefree.training.student import Models

NUM_SHOWN = 64
"""Tokens of a sample that are written down when its step had no finite numbers."""


@dataclass(slots=True, kw_only=True)
class NotFinite:
    """Where a loss or gradient stopped being a finite number."""

    parameters: list[str]
    """Those whose gradient is not finite."""
    beginnings: dict[int, list[int]]
    """Sample id → its first tokens, of all ranks."""


@dataclass(slots=True, kw_only=True)
class StepReport:
    """What an optimizer step did."""

    step: int
    """From 1."""
    loss: float
    losses: dict[str, float]
    grad_norm: float
    """Before clipping."""
    lr: float
    """Of the first group."""
    samples: list[int]
    """Global ids, of all ranks."""
    num_tokens: int
    """Tokens that were read, of all ranks."""
    data_wait_seconds: float
    """For its micro-batches, on this rank."""
    teacher_seconds: float
    """Asking the teacher, on this rank."""
    is_finite: bool
    """False: no update was made."""
    stop: bool
    """Some rank was asked to stop."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Of what is switched on: ZClip and QK-clip."""
    not_finite: NotFinite | None = None
    """What to look at when the step was left out."""


@dataclass(slots=True, kw_only=True)
class Progress:
    """Counters of a run."""

    step: int = 0
    """Optimizer steps behind us, skipped ones included."""
    num_tokens: int = 0
    num_skipped: int = 0
    schedule_start: int = 0
    """The step at which learning rate, λ and μ began."""
    ramp_steps: dict[str, int] = field(default_factory=dict)
    """Lengths of the ramps, as the run began: a later `max_steps` does not move them."""

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        ramp_steps = self.ramp_steps | state["ramp_steps"]
        for name in self.__slots__:
            setattr(self, name, state[name])
        self.ramp_steps = ramp_steps


class WrinkleFreeLightningModule(pl.LightningModule):
    """A student, its objectives, and the teacher that some of them imitate."""

    def __init__(
        self,
        model: nn.Module,
        objective_manager: ObjectiveManager,
        teacher_model: Teacher | nn.Module | None = None,
        optimizer_cfg: OptimizerConfig | None = None,
        scheduler_cfg: SchedulerConfig | None = None,
        gradient_clipping: GradientClippingConfig | None = None,
        *,
        max_steps: int,
        seed: int = 42,
        stop_flag: StopFlag | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.objective_manager = objective_manager
        objective_manager.diffusion = block_diffusion_of(model)
        # No module of ours: its weights are not trained, counted or synchronised.
        self.teacher = LocalTeacher(teacher_model) if isinstance(teacher_model, nn.Module) else teacher_model
        self.optimizer_cfg = optimizer_cfg or OptimizerConfig()
        self.scheduler_cfg = scheduler_cfg or SchedulerConfig()
        self.clipper = ZClip(gradient_clipping or GradientClippingConfig())
        self.max_steps = max_steps
        self.seed = seed
        self.stop_flag = stop_flag or StopFlag()
        self.progress = Progress()
        self.report: StepReport | None = None
        self.optimizer = build_optimizer(model, self.optimizer_cfg)
        self.qk_clip = _qk_clip(model, self.optimizer_cfg)

    @classmethod
    def of(
        cls, config: RunConfig, models: Models, manager: ObjectiveManager, stop_flag: StopFlag
    ) -> "WrinkleFreeLightningModule":
        """As a configuration describes it."""
        training = config.training
        module = cls(
            models.student,
            manager,
            models.teacher,
            training.optimizer,
            training.scheduler,
            training.gradient_clipping,
            max_steps=config.max_steps,
            seed=config.seed,
            stop_flag=stop_flag,
        )
        module.progress.ramp_steps = {
            "lambda": training.lambda_warmup.steps(config.max_steps),
            "mu": training.subln_warmup.steps(config.max_steps),
        }
        if training.activation_sparsity.enabled:
            warmup = training.activation_sparsity.warmup
            module.progress.ramp_steps["sparsity"] = warmup.steps(config.max_steps)
        return module

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer

    def on_fit_start(self) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device)

    def release_teacher(self) -> None:
        """Nobody asks it any more."""
        if self.teacher is not None:
            self.teacher.close()
            self.teacher = None

    def training_step(self, micro_batches: list[Batch], batch_idx: int) -> None:
        manager = self.objective_manager
        micro_batches = [manager.preprocess_batch(batch) for batch in micro_batches]
        names = list(manager.active)
        counts = self._total_counts(micro_batches, names)
        sums = {name: torch.zeros((), device=self.device, dtype=torch.float64) for name in names}
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for number, micro_batch in enumerate(micro_batches):
            seed_micro_batch(self.seed, step=self.progress.step, micro_batch=number, rank=self.global_rank)
            is_last = number == len(micro_batches) - 1
            with contextlib.nullcontext() if is_last else self._without_synchronising():
                with self._recording(is_last):
                    output = manager.step(self.model, self.teacher, micro_batch, counts)
                # DistributedDataParallel averages over ranks, but the counts are of all of them.
                self.manual_backward(output.loss * self._num_ranks)
            total += output.loss.detach()
            for name, part in output.losses.items():
                sums[name] += part.total
        self._update(micro_batches, names, sums, counts, total)

    def _update(
        self,
        micro_batches: list[Batch],
        names: list[str],
        sums: Mapping[str, Tensor],
        counts: Mapping[str, int],
        total: Tensor,
    ) -> None:
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        stop = torch.tensor(float(self.stop_flag.signal != 0), device=self.device)
        values = torch.stack([*(sums[name] for name in names), total, stop.double()])
        if self._num_ranks > 1:
            dist.all_reduce(values)
        *parts, loss, stops, grad_norm = torch.cat([values, norm.double().reshape(1)]).tolist()
        is_finite = all(map(_is_finite, [*parts, loss, grad_norm]))
        self._apply_schedule()
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        numbers, not_finite = {}, None
        if is_finite:
            numbers = self._clipping_numbers(self.clipper.clip(self.model.parameters(), grad_norm))
            optimizer.step()
            if self.qk_clip is not None and (clipped := self.qk_clip.clip()) is not None:
                numbers |= {"max_logit": clipped.max_logit, "qk_factor": clipped.factor}
        else:
            self.progress.num_skipped += 1
            not_finite = self._not_finite(micro_batches)
        optimizer.zero_grad(set_to_none=True)
        if self.teacher is not None:
            numbers |= self.teacher.take_numbers()
        samples, num_tokens = self._samples(micro_batches)
        self.progress.step += 1
        self.progress.num_tokens += num_tokens
        self.report = StepReport(
            step=self.progress.step,
            loss=loss,
            losses={name: value / max(1, counts[name]) for name, value in zip(names, parts, strict=True)},
            grad_norm=grad_norm,
            lr=self.optimizer.param_groups[0]["lr"],
            samples=samples,
            num_tokens=num_tokens,
            data_wait_seconds=self._data_wait_seconds(),
            teacher_seconds=0.0 if self.teacher is None else self.teacher.take_seconds(),
            is_finite=is_finite,
            stop=stops > 0,
            numbers=numbers,
            not_finite=not_finite,
        )

    def _data_wait_seconds(self) -> float:
        data_module = self.trainer.datamodule  # type: ignore[attr-defined]
        return data_module.take_seconds() if isinstance(data_module, WrinkleFreeDataModule) else 0.0

    def _clipping_numbers(self, clipped: Clipped) -> dict[str, float]:
        if not self.clipper.config.zclip.enabled:
            return {}
        return {"clipped_norm": min(clipped.norm, clipped.limit), "z_score": clipped.z_score}

    def _not_finite(self, micro_batches: list[Batch]) -> NotFinite:
        """Every rank calls this."""
        parameters = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        ]
        beginnings = {
            int(sample): tokens[:NUM_SHOWN].tolist()
            for batch in micro_batches
            for sample, tokens in zip(batch.sample_id, batch.input_ids, strict=True)
        }
        if self._num_ranks > 1:
            gathered: list[dict[int, list[int]]] = [{} for _ in range(self._num_ranks)]
            dist.all_gather_object(gathered, beginnings)
            beginnings = {sample: tokens for each in gathered for sample, tokens in each.items()}
        return NotFinite(parameters=parameters, beginnings=dict(sorted(beginnings.items())))

    def _apply_schedule(self) -> None:
        """Learning rates and weight decay of this step."""
        start = self.progress.schedule_start
        step, total = self.progress.step - start, self.max_steps - start
        apply_schedule(
            self.optimizer,
            learning_rate_factor(step, total, self.scheduler_cfg),
            weight_decay_at(step, total, self.optimizer_cfg),
        )

    def _recording(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """The last micro-batch tells how large attention logits are."""
        if self.qk_clip is None or not is_last:
            return contextlib.nullcontext()
        return self.qk_clip.recording()

    def _total_counts(self, micro_batches: list[Batch], names: list[str]) -> dict[str, int]:
        """Of all micro-batches and ranks."""
        each = [self.objective_manager.counts(micro_batch) for micro_batch in micro_batches]
        counts = [sum(int(count[name]) for count in each) for name in names]
        if self._num_ranks > 1:
            shared = torch.tensor(counts, device=self.device)
            dist.all_reduce(shared)
            counts = shared.tolist()
        return dict(zip(names, counts, strict=True))

    def _samples(self, micro_batches: list[Batch]) -> tuple[list[int], int]:
        """Ids of the step's samples on all ranks, in their order, and the tokens in them."""
        ids = torch.cat([micro_batch.sample_id for micro_batch in micro_batches])
        if self._num_ranks > 1:
            gathered = [torch.empty_like(ids) for _ in range(self._num_ranks)]
            dist.all_gather(gathered, ids)
            ids = torch.cat(gathered)
        listed = sorted(ids.tolist())
        return listed, len(listed) * micro_batches[0].input_ids.shape[1]

    @property
    def _num_ranks(self) -> int:
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    def _without_synchronising(self) -> contextlib.AbstractContextManager[Any]:
        """Gradients of all but the last micro-batch stay on their rank."""
        if self._num_ranks == 1:
            return contextlib.nullcontext()
        return self.trainer.strategy.block_backward_sync()  # type: ignore[attr-defined, no-any-return]


def _qk_clip(model: nn.Module, config: OptimizerConfig) -> QKClip | None:
    if config.type is not OptimizerType.muonclip or not config.enable_clipping:
        return None
    clip = QKClip(model, threshold=config.clipping_threshold, alpha=config.clipping_alpha)
    return clip if clip.why_inactive is None else None


def _is_finite(value: float) -> bool:
    return value - value == 0
