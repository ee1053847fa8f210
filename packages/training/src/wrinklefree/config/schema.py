"""What a run can be told: one tree of dataclasses, checked where it is built.

YAML says what differs from these defaults; `load_config` is the only way in. A number of steps that nobody
wrote is a share of the run, with an upper limit: presets hold for any `max_steps`.
"""

import math
import os
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from bitnet_arch import LRCInit, Schedule, SubLNInit
from durable import UserError
from wrinklefree.objectives.balance import BalanceConfig, BalanceMode
from wrinklefree.objectives.curriculum import CurriculumConfig
from wrinklefree.objectives.diffusion import ON_MASKED_TOKENS, DiffusionConfig
from wrinklefree.optimizers.config import GradientClippingConfig, OptimizerConfig, SchedulerConfig


class Stage(StrEnum):
    """What a run is for; it names the directory of the run."""

    unified = "unified"
    base = "base"
    stage1 = "stage1"
    stage1_9 = "stage1_9"
    stage2 = "stage2"
    stage3 = "stage3"
    bitdistill = "bitdistill"
    lrc = "lrc"


class Precision(StrEnum):
    """The dtype of the forward and backward pass. Weights and optimizer stay in fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass(kw_only=True)
class ModelConfig:
    """Which decoder is trained."""

    name: str = "smollm2_135m"
    """What the run calls it."""
    pretrained_name: str = "HuggingFaceTB/SmolLM2-135M"
    """A directory, a .gguf file, a name on the hub, or a built-in one such as tiny_llama."""
    tokenizer: str | None = None
    """A directory or a name on the hub, or `demo`; none takes the one that lies with the model."""
    attention_dropout: float | None = None
    """Of the attention weights in training; none keeps the model's own."""

    def __post_init__(self) -> None:
        if self.attention_dropout is not None:
            require(
                0 <= self.attention_dropout < 1,
                "model.attention_dropout",
                self.attention_dropout,
                "0 to below 1",
            )


class SubLNChoice(StrEnum):
    """Norms in front of projections."""

    auto = "auto"
    """`output` where an engine can compute it, else `none`."""
    none = "none"
    output = "output"
    """In front of o and down, as the paper has it."""
    all = "all"


@dataclass(kw_only=True)
class AutoConvertConfig:
    """How a dense model becomes ternary before training."""

    exclude_layers: list[str] = field(default_factory=list)
    """Projections to leave dense: a name (`q_proj`), a path or the end of one, or a glob."""
    subln: SubLNChoice = SubLNChoice.none
    subln_init: SubLNInit = SubLNInit.ones
    calibration_batches: int = 4
    """Training batches that a calibrated start looks at, of SubLN or of a low-rank correction."""

    def __post_init__(self) -> None:
        require(
            self.calibration_batches >= 1,
            "training.auto_convert.calibration_batches",
            self.calibration_batches,
            "1 or more",
        )


@dataclass(kw_only=True)
class RampConfig:
    """A dial that goes from 0 to 1 over the first optimizer steps."""

    enabled: bool = True
    """Off: the dial stands at 1 from the start."""
    warmup_steps: int | None = None
    """Optimizer steps; none takes a share of the run."""
    share: float = 0.4
    """Of the run, when `warmup_steps` is none."""
    limit_steps: int = 1000
    """At most so many steps, when `warmup_steps` is none."""
    schedule: Schedule = Schedule.linear

    def steps(self, max_steps: int) -> int:
        """Optimizer steps until the dial stands at 1."""
        if not self.enabled:
            return 0
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(self.limit_steps, int(self.share * max_steps))

    def check(self, key: str, max_steps: int) -> None:
        require(0 <= self.share <= 1, f"{key}.share", self.share, "0 to 1")
        require(self.limit_steps >= 0, f"{key}.limit_steps", self.limit_steps, "0 or more")
        if self.warmup_steps is not None:
            require(self.warmup_steps >= 0, f"{key}.warmup_steps", self.warmup_steps, "0 or more")
            if self.enabled and self.warmup_steps >= max_steps:
                raise UserError(
                    f"{key}.warmup_steps: the ramp does not end within the run",
                    f"{self.warmup_steps} steps, training.max_steps={max_steps}",
                    "give fewer steps, or none for a share of the run",
                )


class SparsityMode(StrEnum):
    """Which activations of a token stay."""

    topk = "topk"
    block = "block"


@dataclass(kw_only=True)
class SparsityBlockConfig:
    """`mode: block` keeps the n largest of every m neighbours."""

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        key = "training.activation_sparsity.block"
        require(self.m >= 2, f"{key}.m", self.m, "2 or more")
        require(1 <= self.n < self.m, f"{key}.n", self.n, f"1 to {self.m - 1}")


@dataclass(kw_only=True)
class ActivationSparsityConfig:
    """Only a token's largest activations reach the ternary weights (Q-Sparse, arXiv 2407.10969)."""

    enabled: bool = False
    mode: SparsityMode = SparsityMode.topk
    sparsity_ratio: float = 0.61
    """Share of activations that `mode: topk` drops, once the ramp has ended."""
    block: SparsityBlockConfig = field(default_factory=SparsityBlockConfig)
    warmup: RampConfig = field(default_factory=RampConfig)
    """How the ratio goes from 0 to its value."""

    def __post_init__(self) -> None:
        key = "training.activation_sparsity.sparsity_ratio"
        require(0 <= self.sparsity_ratio < 1, key, self.sparsity_ratio, "0 to below 1")

    @property
    def target_ratio(self) -> float:
        """Share of activations that are dropped once the ramp has ended."""
        return self.sparsity_ratio if self.mode is SparsityMode.topk else 1 - self.block.n / self.block.m

    @property
    def block_width(self) -> int | None:
        """Neighbours among which some stay; none is the whole token."""
        return None if self.mode is SparsityMode.topk else self.block.m


class TeacherBackend(StrEnum):
    """Where the teacher runs."""

    local = "local"
    vllm = "vllm"


class TeacherDtype(StrEnum):
    """What a teacher that runs here computes in."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class CacheDtype(StrEnum):
    """What log probabilities are stored in."""

    fp16 = "fp16"
    fp32 = "fp32"


@dataclass(kw_only=True)
class LRCConfig:
    """A low-rank correction U(Vᵀx) beside every ternary projection; nothing else is trained (2412.07902)."""

    enabled: bool = False
    rank: int | None = None
    """Of U and V; none takes a share of the full rank."""
    rank_percentage: float = 0.1
    """Of the smaller side of a projection, when `rank` is none."""
    init: LRCInit | None = None
    """`calibrated` starts at the least error on training batches, `svd` at W − Q(W), `kaiming` at nothing.
    None takes `calibrated` for a model that is only now converted, and `kaiming` for one that was trained
    as ternary: its latent weights are no better than their codes.
    """

    def __post_init__(self) -> None:
        key = "training.lrc"
        require(self.rank is None or self.rank >= 1, f"{key}.rank", self.rank, "1 or more")
        share = self.rank_percentage
        require(0 < share <= 1, f"{key}.rank_percentage", share, "above 0, up to 1")


@dataclass(kw_only=True)
class TeacherConfig:
    """Who is imitated when an objective needs a teacher."""

    backend: TeacherBackend = TeacherBackend.local
    """Here, or behind vLLM's HTTP interface, which tells the most probable tokens alone."""
    pretrained_name: str | None = None
    """As `model.pretrained_name`; none takes the student as it was before conversion."""
    dtype: TeacherDtype = TeacherDtype.auto
    """Of a teacher that runs here; auto is `training.precision`."""
    base_url: str | None = None
    """Of a vLLM server, such as http://localhost:8000."""
    model: str | None = None
    """Its name there; none takes the one that is served."""
    api_key_env: str | None = None
    """The environment variable that holds the key of the server."""
    timeout_seconds: float = 45.0
    """How long an answer may take, three tries together."""
    top_k: int = 64
    """Most probable tokens that a server is asked for (its --max-logprobs), and that a cache keeps."""
    cache: str | None = None
    """A directory: what the teacher said is kept there, and read by later runs; none asks anew."""
    cache_dtype: CacheDtype = CacheDtype.fp16
    """Of the log probabilities in the cache."""

    def __post_init__(self) -> None:
        key = "training.teacher"
        require(1 <= self.top_k < 2**20, f"{key}.top_k", self.top_k, "1 or more")
        seconds = self.timeout_seconds
        require(0 < seconds <= 3600, f"{key}.timeout_seconds", seconds, "above 0, at most 3600")
        if self.backend is TeacherBackend.vllm:
            self._check_server(key)
        elif self.base_url is not None or self.model is not None or self.api_key_env is not None:
            raise UserError(
                f"{key}: names a server, and the teacher runs here",
                f"{key}.backend=local",
                f"set {key}.backend=vllm, or leave out base_url, model and api_key_env",
            )

    @property
    def knows_inside(self) -> bool:
        """Can it be asked for hidden states and attention? Of others the most probable tokens are known."""
        return self.backend is TeacherBackend.local and self.cache is None

    def _check_server(self, key: str) -> None:
        if self.pretrained_name is not None:
            raise UserError(
                f"{key}.pretrained_name: is for a teacher that runs here",
                f"{key}.backend=vllm",
                f"name the server's model in {key}.model",
            )
        if self.base_url is None:
            raise UserError(f"{key}.base_url: is needed to reach vLLM", fix="give http://HOST:PORT")
        address = urlsplit(self.base_url)
        if address.username is not None or address.password is not None or address.query:
            raise UserError(
                f"{key}.base_url: holds more than an address",
                fix=f"leave out user, password and query, and name a key's variable in {key}.api_key_env",
            )
        if address.scheme not in ("http", "https") or not address.hostname:
            raise UserError(f"{key}.base_url: is no address", self.base_url, "give http://HOST:PORT")


@dataclass(kw_only=True)
class ResumeConfig:
    """Where a run goes on."""

    auto: bool = True
    """Go on from the newest checkpoint of this run's own directory."""
    checkpoint_path: str | None = None
    """Where an empty run directory starts from: a checkpoint directory, or a directory of them."""
    strict_model_load: bool = True
    """Take the checkpoint's model; off gives the configured one the weights that fit, and prints the rest."""
    load_optimizer_state: bool = True
    load_scheduler_state: bool = True
    """Off starts the learning rate, λ and μ at their first step, whatever the step count is."""
    load_training_state: bool = True
    """Off starts step count, data and influence at the beginning."""
    allow: list[str] = field(default_factory=list)
    """Keys whose change is accepted when resuming."""


@dataclass(kw_only=True)
class Stage1Config:
    """Stage 1 converts the model and saves it; it trains when somebody says for how long."""

    finetune_steps: int = 0
    """Optimizer steps of `training=stage1_subln` without `max_steps`."""

    def __post_init__(self) -> None:
        steps = self.finetune_steps
        require(steps >= 0, "training.stage1.finetune_steps", steps, "0 or more")


@dataclass(kw_only=True)
class CheckpointConfig:
    """When the run is saved."""

    save_interval: int = 200
    """Optimizer steps."""
    keep_last_n: int = 5
    save_at_end: bool = True
    """Write `checkpoints/final` after the last step."""
    save_best: bool = True
    """Keep the step with the smallest validation loss in `checkpoints/best`; needs `validation.every`."""

    def __post_init__(self) -> None:
        require(self.save_interval >= 1, "training.checkpoint.save_interval", self.save_interval, "1 or more")
        require(self.keep_last_n >= 1, "training.checkpoint.keep_last_n", self.keep_last_n, "1 or more")


@dataclass(kw_only=True)
class ValidationConfig:
    """Held-out loss on the probes of the training sources, at the present λ and μ and at 1."""

    every: int | None = None
    """Optimizer steps; none measures at the end only."""
    num_batches: int = 8
    """For each domain."""
    batch_size: int = 8

    def __post_init__(self) -> None:
        require(self.every is None or self.every >= 1, "training.validation.every", self.every, "1 or more")
        require(self.num_batches >= 0, "training.validation.num_batches", self.num_batches, "0 or more")
        require(self.batch_size >= 1, "training.validation.batch_size", self.batch_size, "1 or more")


@dataclass(kw_only=True)
class EarlyStoppingConfig:
    """End the run when the validation loss at λ = μ = 1 has stopped falling."""

    enabled: bool = False
    patience: int = 5
    """So many validations in a row without an improvement end the run."""
    min_delta: float = 0.01
    """The loss must fall by more than this to have improved."""
    min_evals: int = 10
    """No end before so many validations."""

    def __post_init__(self) -> None:
        require(self.patience >= 1, "training.early_stopping.patience", self.patience, "1 or more")
        require(self.min_delta >= 0, "training.early_stopping.min_delta", self.min_delta, "0 or more")
        require(self.min_evals >= 1, "training.early_stopping.min_evals", self.min_evals, "1 or more")


@dataclass(kw_only=True)
class SamplesConfig:
    """Continuations of prompts during training, in `samples.jsonl`: greedy ones, and drawn ones."""

    every: int | None = None
    """Optimizer steps; none writes no samples."""
    prompts: list[str] = field(default_factory=lambda: ["The", "Once upon a time"])
    max_new_tokens: int = 32
    temperature: float = 0.8
    """Of the drawn ones."""

    def __post_init__(self) -> None:
        require(self.every is None or self.every >= 1, "training.samples.every", self.every, "1 or more")
        key = "training.samples.max_new_tokens"
        require(self.max_new_tokens >= 1, key, self.max_new_tokens, "1 or more")
        require(self.temperature > 0, "training.samples.temperature", self.temperature, "above 0")


@dataclass(kw_only=True)
class InfluenceRunConfig:
    """Mixture weights that follow the measured use of each source (`data_handler.influence`)."""

    enabled: bool = False
    update_interval: int = 1000
    """Optimizer steps between updates."""
    warmup_steps: int = 500
    """No update before this optimizer step."""
    learning_rate: float = 0.2
    """Share of the way from the present weights to the proposed ones."""
    min_weight: float = 0.05
    max_weight: float = 0.60
    noise: float = 2.0
    """Standard errors by which a source must differ before its weight moves."""
    num_samples: int = 16
    """Blocks of each source and of each probe that are scored."""

    def __post_init__(self) -> None:
        require(self.num_samples >= 2, "training.influence.num_samples", self.num_samples, "2 or more")


@dataclass(kw_only=True)
class NonFiniteConfig:
    """What happens when a loss or gradient is not a finite number."""

    max_skipped: int = 3
    """So many steps in a row are left out; one more ends the run with exit code 6."""

    def __post_init__(self) -> None:
        require(self.max_skipped >= 0, "training.non_finite.max_skipped", self.max_skipped, "0 or more")


@dataclass(kw_only=True)
class WandBConfig:
    """Weights & Biases, which gets the rows of `metrics.jsonl`. Offline without a key or an answer."""

    enabled: bool = False
    project: str = "wrinklefree"
    entity: str | None = None
    name: str | None = None
    """Of the run; none makes one of model, stage, optimizer, learning rate and batch."""
    tags: list[str] = field(default_factory=list)
    timeout_seconds: float = 10.0
    """How long the end of a run waits for what is not sent yet."""

    def __post_init__(self) -> None:
        key = "training.logging.wandb.timeout_seconds"
        require(0 < self.timeout_seconds < 3600, key, self.timeout_seconds, "above 0, below 3600")


@dataclass(kw_only=True)
class LoggingConfig:
    """What is printed, and who else is told."""

    log_interval: int = 10
    """Optimizer steps between two printed lines; `metrics.jsonl` has every step."""
    ternary_interval: int | None = 100
    """Optimizer steps between two counts of zero and flipped codes; none does not count."""
    wandb: WandBConfig = field(default_factory=WandBConfig)

    def __post_init__(self) -> None:
        interval = self.ternary_interval
        require(interval is None or interval >= 1, "training.logging.ternary_interval", interval, "1 or more")
        require(self.log_interval >= 1, "training.logging.log_interval", self.log_interval, "1 or more")


@dataclass(kw_only=True)
class TorchCompileConfig:
    """Compiled decoder blocks: faster steps after a minute or more of compiling."""

    enabled: bool = False


@dataclass(kw_only=True)
class TrainingConfig:
    """What a run does."""

    stage: Stage = Stage.unified
    max_steps: int | None = None
    """Optimizer steps; none derives them from `total_tokens`, or from `stage1.finetune_steps` in stage 1."""
    total_tokens: int = 10_000_000_000
    max_seq_length: int = 512
    """Tokens of a block."""
    batch_size: int = 32
    """Blocks of a micro-batch, on each device."""
    gradient_accumulation_steps: int = 16
    """Micro-batches of an optimizer step, on each device."""
    auto_batch_size: bool = False
    """Take the largest micro-batch that fits, and as many of them as make the same samples of a step."""
    precision: Precision = Precision.fp32
    output_dir: str | None = None
    """The same as `output_dir` at the root, which it overrides."""
    torch_compile: TorchCompileConfig = field(default_factory=TorchCompileConfig)
    auto_convert: AutoConvertConfig = field(default_factory=AutoConvertConfig)
    lrc: LRCConfig = field(default_factory=LRCConfig)
    lambda_warmup: RampConfig = field(default_factory=RampConfig)
    """λ: how much of the quantised values is blended in."""
    subln_warmup: RampConfig = field(default_factory=RampConfig)
    """μ: how much of the added norms is blended in."""
    activation_sparsity: ActivationSparsityConfig = field(default_factory=ActivationSparsityConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    gradient_clipping: GradientClippingConfig = field(default_factory=GradientClippingConfig)
    objectives: dict[str, Any] = field(default_factory=lambda: {"continue_pretrain": {"weight": 1.0}})
    """Name → weight and options of each loss."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """How strongly objectives pull, measured and balanced."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """Of objectives on masked tokens."""
    stage1: Stage1Config = field(default_factory=Stage1Config)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    influence: InfluenceRunConfig = field(default_factory=InfluenceRunConfig)
    non_finite: NonFiniteConfig = field(default_factory=NonFiniteConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        for name in ("total_tokens", "max_seq_length", "batch_size", "gradient_accumulation_steps"):
            require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "1 or more")
        require(
            self.max_steps is None or self.max_steps >= 1, "training.max_steps", self.max_steps, "1 or more"
        )
        require(self.max_seq_length >= 2, "training.max_seq_length", self.max_seq_length, "2 or more")
        length, block = self.max_seq_length, self.diffusion.block_size
        if length % block and any(name in self.objectives for name in ON_MASKED_TOKENS):
            raise UserError(
                "training.diffusion.block_size: does not divide training.max_seq_length",
                f"{block} and {length}",
                f"set training.max_seq_length to {max(1, length // block) * block}",
            )
        interval = self.balance.interval
        if self.balance.mode is BalanceMode.gradnorm and interval is not None and len(self.objectives) < 2:
            raise UserError(
                "training.balance.mode: gradnorm balances two objectives or more",
                ", ".join(self.objectives),
                "set training.balance.mode=none",
            )
        if self.early_stopping.enabled and self.validation.every is None:
            raise UserError(
                "training.early_stopping: nothing is measured before the end",
                "training.validation.every=null",
                "set training.validation.every to a number of steps",
            )


@dataclass(kw_only=True)
class DataRunConfig:
    """What is read."""

    config_name: str = "mixed_pretrain"
    """A config of data_handler (`wrinklefree data list`), or the path of a YAML file."""
    directory: str | None = None
    """Where the token shards are, or are put; none shares one place between runs."""
    window_samples: int = 1024
    """New mixture weights begin with the next window of so many samples."""
    num_workers: int = 0
    """Processes that read ahead."""

    def __post_init__(self) -> None:
        require(self.window_samples >= 1, "data.window_samples", self.window_samples, "1 or more")
        require(self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")


class Strategy(StrEnum):
    """How many processes train one model."""

    single = "single"
    ddp = "ddp"
    fsdp = "fsdp"


@dataclass(kw_only=True)
class DistributedConfig:
    strategy: Strategy = Strategy.single
    timeout_seconds: float = 120.0
    """How long a rank waits for the others."""

    def __post_init__(self) -> None:
        require(self.timeout_seconds > 0, "distributed.timeout_seconds", self.timeout_seconds, "above 0")


SEQUENCES_PER_STEP = 64
"""Of an optimizer step, in every profile of a GPU."""


@dataclass(kw_only=True)
class GpuConfig:
    """What fits on a GPU; `gpu=NAME` chooses micro-batch and accumulation for the model and the stage."""

    name: str | None = None
    micro_batches: dict[str, dict[str, int]] = field(default_factory=dict)
    """Model → `alone` or `with_teacher` → blocks of a micro-batch."""


@dataclass(kw_only=True)
class GcsConfig:
    """Copies of all checkpoints in a bucket."""

    enabled: bool = False
    bucket: str | None = None
    """A bucket of Google's, or the address of a folder that fsspec opens, such as `s3://…`."""
    timeout_seconds: float = 3600.0
    """How long the end of a run waits for copies that are under way."""

    def __post_init__(self) -> None:
        if self.enabled and not self.bucket:
            raise UserError(
                "gcs.bucket: is needed to copy checkpoints", fix="name one, or set gcs.enabled=false"
            )
        require(self.timeout_seconds > 0, "gcs.timeout_seconds", self.timeout_seconds, "above 0")


@dataclass(kw_only=True)
class HubConfig:
    """Where on the Hugging Face hub a stage looks for the one before it, after this disk and the bucket."""

    repo: str | None = None
    """ORGANISATION/NAME, with the run directories in it as they are in a bucket; `@REVISION` may follow."""

    def __post_init__(self) -> None:
        repo = self.repo
        named = repo is None or (repo.count("/") == 1 and all(repo.split("/")))
        require(named, "hub.repo", repo, "ORGANISATION/NAME")


class ExportTarget(StrEnum):
    """Who will run the trained model."""

    gguf = "gguf"
    """An engine, so one must have a graph for it."""
    hf = "hf"
    """transformers, which has one for every model that we train."""


@dataclass(kw_only=True)
class ExportConfig:
    """What could not be exported in the end is refused before it is trained."""

    target: ExportTarget = ExportTarget.gguf
    smoke_steps: int = 100
    """Runs of so many optimizer steps first write, read back and load an export; shorter ones lose little."""

    def __post_init__(self) -> None:
        require(self.smoke_steps >= 1, "export.smoke_steps", self.smoke_steps, "1 or more")


@dataclass(kw_only=True)
class RunConfig:
    """A whole run."""

    seed: int = 42
    output_dir: str = "outputs"
    experiment_name: str = "wrinklefree_${model.name}"
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataRunConfig = field(default_factory=DataRunConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    gpu: GpuConfig = field(default_factory=GpuConfig)
    gcs: GcsConfig = field(default_factory=GcsConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1")
        name = self.experiment_name
        require(
            name not in ("", ".", "..") and not set(name) & set("/\\\0"),
            "experiment_name",
            name,
            "a plain name",
        )
        if self.training.output_dir is not None:
            self.output_dir = self.training.output_dir
        training = self.training
        training.lambda_warmup.check("training.lambda_warmup", self.max_steps)
        training.subln_warmup.check("training.subln_warmup", self.max_steps)
        if training.activation_sparsity.enabled:
            training.activation_sparsity.warmup.check("training.activation_sparsity.warmup", self.max_steps)

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the run; derived from the tokens when nobody gave them."""
        training = self.training
        if training.max_steps is not None:
            return training.max_steps
        if training.stage is Stage.stage1:
            return training.stage1.finetune_steps
        # torchrun says how many processes take part; each reads micro-batches of its own.
        num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
        per_rank = training.batch_size * training.gradient_accumulation_steps * training.max_seq_length
        return max(1, training.total_tokens // (per_rank * num_ranks))


def require(holds: bool, key: str, found: object, accepted: str) -> None:
    """UserError for a value outside its range; NaN compares false, so it never holds."""
    if not holds:
        shown = "not a number" if isinstance(found, float) and math.isnan(found) else found
        raise UserError(f"{key}: out of range", shown, f"give {accepted}")
