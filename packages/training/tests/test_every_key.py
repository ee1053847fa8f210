"""Every key of the schema is read: another value builds, writes or prints something else, or is refused.

Each key is changed in a run that would feel it. What a run shows of itself is its modules, its optimizer and
trainer, each row of `metrics.jsonl`, what was printed, the files and the weights: never `config.yaml`, the
fingerprint or the run's name, which only repeat what they were told.
"""

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import io
import json
import logging
import re
import shutil
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from data_handler.workers import WorkerPool
from durable import UserError
from wrinklefree.config import load_config
from wrinklefree.config.loading import schema_keys
from wrinklefree.run import run

SMALL = (
    "model=tiny_llama",
    "training=base",
    "data=demo",
    "training.max_seq_length=32",
    "training.batch_size=2",
    "training.gradient_accumulation_steps=2",
    "training.max_steps=5",
    "training.logging.log_interval=1",
    "training.validation.num_batches=0",
)
TIMED = re.compile(r"\d[\d.,:e+-]*")
VOLATILE = {
    "time",
    "seconds",
    "tokens_per_second",
    "mfu",
    "memory",
    "from",
    "data_wait_seconds",
    "teacher_seconds",
}

SUBLN = "training.auto_convert.subln=output"
LAMBDA = "training.lambda_warmup.enabled=true"
SPARSE = "training.activation_sparsity.enabled=true"
CLIPPED = ("training.gradient_clipping.zclip.enabled=true", "training.gradient_clipping.zclip.warmup_steps=2")
SPIKES = (
    *CLIPPED,
    "training.gradient_clipping.zclip.z_threshold=0.01",
    "training.gradient_clipping.max_norm=null",
)
QK = ("training.optimizer.type=muonclip", "training.optimizer.clipping_threshold=0.001")
VALIDATED = (
    "training.validation.every=1",
    "training.validation.num_batches=1",
    "training.validation.batch_size=2",
)
PLATEAU = (
    *VALIDATED,
    "training.early_stopping.enabled=true",
    "training.early_stopping.patience=1",
    "training.early_stopping.min_evals=1",
    "training.early_stopping.min_delta=100",
)
SAMPLES = ("training.samples.every=2", "training.samples.max_new_tokens=4", "training.samples.prompts=[Once]")
INFLUENCED = (
    "training.influence.enabled=true",
    "training.influence.update_interval=1",
    "training.influence.warmup_steps=0",
    "training.influence.num_samples=3",
    "training.influence.noise=0",
    "training.influence.min_weight=0.15",
    "training.influence.learning_rate=0.5",
    "data.window_samples=8",
)
RESUMED = "training.resume.checkpoint_path={first}"
AGAIN = "output_dir={copy}"
RANKS = "WORLD_SIZE=2"
BUCKET = ("gcs.enabled=true", "gcs.bucket=file://{bucket}")
HALVES = "{until: 0.5, objectives: {continue_pretrain: 1}}"
PHASES = (
    "training.curriculum.enabled=true",
    f"training.curriculum.phases=[{HALVES},{{until: 1, objectives: {{continue_pretrain: 0.25}}}}]",
)
CORRECTED = "training.lrc.enabled=true"
MASKED = "training.objectives.dlm={weight: 1}"
DROWNED = "training.objectives.logits_distill={weight: 1000}"
WANDB = "training.logging.wandb.enabled=true"
TAUGHT = "training.objectives.logits_distill.weight=1"
SERVED = (
    TAUGHT,
    "training.teacher.backend=vllm",
    "training.teacher.base_url={server}",
    "training.teacher.timeout_seconds=0.2",
)
CACHED = (TAUGHT, "training.teacher.cache={empty}")
PROFILE = (
    "gpu.name=big",
    "gpu.micro_batches.tiny_llama.alone=32",
    "training.batch_size=~",
    "training.gradient_accumulation_steps=~",
    "training.max_steps=1",
)
WEIGHT_DECAY = "training.optimizer.weight_decay=0.1"

WALKED: dict[str, tuple[str, ...]] = {
    "seed": ("43",),
    "output_dir": ("elsewhere/than/before",),
    "experiment_name": ("another",),
    "model.name": ("another",),
    "model.pretrained_name": ("tiny_qwen3",),
    "model.tokenizer": ("gone/for/good",),
    "model.attention_dropout": ("0.5",),
    "training.stage": ("unified",),
    "training.max_steps": ("4",),
    "training.total_tokens": ("256", "training.max_steps=null", "training.total_tokens=512"),
    "training.auto_batch_size": ("true",),
    "training.torch_compile.enabled": ("true",),
    "training.max_seq_length": ("16",),
    "training.batch_size": ("1",),
    "training.gradient_accumulation_steps": ("1",),
    "training.precision": ("bf16",),
    "training.output_dir": ("elsewhere/than/that",),
    "training.auto_convert.exclude_layers": ("[q_proj]",),
    "training.auto_convert.subln": ("output",),
    "training.auto_convert.subln_init": ("calibrated", SUBLN),
    "training.auto_convert.calibration_batches": ("1", SUBLN, "training.auto_convert.subln_init=calibrated"),
    "training.lambda_warmup.enabled": ("true",),
    "training.lambda_warmup.warmup_steps": ("3", LAMBDA),
    "training.lambda_warmup.share": ("0.8", LAMBDA),
    "training.lambda_warmup.limit_steps": ("1", LAMBDA),
    "training.lambda_warmup.schedule": ("cosine", LAMBDA, "training.lambda_warmup.warmup_steps=4"),
    "training.subln_warmup.enabled": ("false", SUBLN),
    "training.subln_warmup.warmup_steps": ("3", SUBLN),
    "training.subln_warmup.share": ("0.8", SUBLN),
    "training.subln_warmup.limit_steps": ("1", SUBLN),
    "training.subln_warmup.schedule": ("cosine", SUBLN, "training.subln_warmup.warmup_steps=4"),
    "training.activation_sparsity.enabled": ("true",),
    "training.activation_sparsity.mode": ("block", SPARSE),
    "training.activation_sparsity.sparsity_ratio": ("0.25", SPARSE),
    "training.activation_sparsity.block.n": ("1", SPARSE, "training.activation_sparsity.mode=block"),
    "training.activation_sparsity.block.m": ("8", SPARSE, "training.activation_sparsity.mode=block"),
    "training.activation_sparsity.warmup.enabled": ("false", SPARSE),
    "training.activation_sparsity.warmup.warmup_steps": ("3", SPARSE),
    "training.activation_sparsity.warmup.share": ("0.8", SPARSE),
    "training.activation_sparsity.warmup.limit_steps": ("1", SPARSE),
    "training.activation_sparsity.warmup.schedule": (
        "cosine",
        SPARSE,
        "training.activation_sparsity.warmup.warmup_steps=4",
    ),
    "training.optimizer.type": ("muonclip", "training.optimizer.type=adamw"),
    "training.optimizer.lr": ("0.01", "training.optimizer.type=adamw"),
    "training.optimizer.lr_muon": ("0.01", "training.optimizer.type=muonclip"),
    "training.optimizer.lr_adam": ("0.01", "training.optimizer.type=muonclip"),
    "training.optimizer.weight_decay": ("0.1",),
    "training.optimizer.weight_decay_final": ("0.05", WEIGHT_DECAY),
    "training.optimizer.weight_decay_switch": (
        "0.9",
        WEIGHT_DECAY,
        "training.optimizer.weight_decay_final=0.05",
    ),
    "training.optimizer.momentum": ("0.5", "training.optimizer.type=muonclip"),
    "training.optimizer.adam_betas": ("[0.5,0.9]",),
    "training.optimizer.adam_eps": ("0.01",),
    "training.optimizer.enable_clipping": ("false", *QK),
    "training.optimizer.clipping_threshold": ("0.002", *QK),
    "training.optimizer.clipping_alpha": ("0.9", *QK),
    "training.scheduler.type": ("linear", "training.scheduler.type=constant"),
    "training.scheduler.warmup_steps": ("3",),
    "training.scheduler.warmup_share": ("0.6",),
    "training.scheduler.warmup_limit_steps": ("1", "training.scheduler.warmup_share=0.6"),
    "training.scheduler.decay_ratio": ("0.6", "training.scheduler.type=wsd"),
    "training.scheduler.decay_type": (
        "cosine",
        "training.scheduler.type=wsd",
        "training.scheduler.decay_ratio=0.8",
    ),
    "training.scheduler.min_lr_ratio": ("0.5", "training.scheduler.type=linear"),
    "training.gradient_clipping.max_norm": ("0.01",),
    "training.gradient_clipping.zclip.enabled": ("true",),
    "training.gradient_clipping.zclip.z_threshold": ("9", *SPIKES),
    "training.gradient_clipping.zclip.ema_decay": ("0.1", *SPIKES),
    "training.gradient_clipping.zclip.warmup_steps": ("4", *SPIKES),
    "training.gradient_clipping.zclip.mode": ("mean", *SPIKES),
    "training.gradient_clipping.zclip.clip_factor": ("0.5", *SPIKES),
    "training.gradient_clipping.zclip.min_limit": ("100", *SPIKES),
    "training.gradient_clipping.zclip.skip_update_on_spike": ("true", *SPIKES),
    "training.objectives": ("{continue_pretrain: {weight: 0.5}}",),
    "export.target": ("hf", "model=tiny_qwen3", SUBLN),
    "export.smoke_steps": ("3",),
    "hub.repo": ("nobody/nothing", "training=stage2_pretrain"),
    "training.lrc.enabled": ("true",),
    "training.lrc.rank": ("2", CORRECTED),
    "training.lrc.rank_percentage": ("0.5", CORRECTED),
    "training.lrc.init": ("svd", CORRECTED),
    "training.balance.mode": ("gradnorm", DROWNED),
    "training.balance.interval": ("2", DROWNED),
    "training.balance.warn_steps": ("1", DROWNED, "training.balance.interval=1"),
    "training.diffusion.block_size": ("8", MASKED),
    "training.diffusion.mask_token_id": ("1", MASKED),
    "training.diffusion.complementary": ("false", MASKED),
    "training.diffusion.mask_prob": ("0.2", MASKED),
    "training.diffusion.attention": ("causal", MASKED),
    "training.curriculum.enabled": ("false", *PHASES),
    "training.curriculum.interpolation": ("linear", *PHASES),
    "training.curriculum.phases": (
        f"[{HALVES},{{until: 1, objectives: {{continue_pretrain: 0.5}}}}]",
        *PHASES,
    ),
    "training.stage1.finetune_steps": (
        "2",
        "training=stage1_subln",
        "training.max_steps=null",
        "training.stage1.finetune_steps=1",
    ),
    "training.teacher.backend": ("vllm", TAUGHT),
    "training.teacher.pretrained_name": ("tiny_qwen3", TAUGHT),
    "training.teacher.dtype": ("bf16", TAUGHT),
    "training.teacher.base_url": ("http://127.0.0.1:9", *SERVED),
    "training.teacher.model": ("another", *SERVED),
    "training.teacher.api_key_env": ("NOT_SET", *SERVED),
    "training.teacher.timeout_seconds": ("0.3", *SERVED),
    "training.teacher.top_k": ("7", *CACHED),
    "training.teacher.cache": ("{empty}", TAUGHT),
    "training.teacher.cache_dtype": ("fp32", *CACHED),
    "training.resume.auto": ("false", AGAIN),
    "training.resume.checkpoint_path": ("{first}",),
    "training.resume.strict_model_load": ("false", RESUMED, SUBLN),
    "training.resume.load_optimizer_state": ("false", RESUMED),
    "training.resume.load_scheduler_state": ("false", RESUMED),
    "training.resume.load_training_state": ("false", RESUMED),
    "training.resume.allow": ("[seed]", AGAIN, "seed=7"),
    "training.checkpoint.save_interval": ("2",),
    "training.checkpoint.keep_last_n": ("1", "training.checkpoint.save_interval=1"),
    "training.checkpoint.save_at_end": ("false",),
    "training.checkpoint.save_best": ("false", *VALIDATED),
    "training.validation.every": ("2", "training.validation.num_batches=1"),
    "training.validation.num_batches": ("2", *VALIDATED),
    "training.validation.batch_size": ("3", *VALIDATED),
    "training.early_stopping.enabled": ("false", *PLATEAU),
    "training.early_stopping.patience": ("2", *PLATEAU),
    "training.early_stopping.min_delta": ("-100", *PLATEAU),
    "training.early_stopping.min_evals": ("4", *PLATEAU),
    "training.samples.every": ("1", *SAMPLES),
    "training.samples.prompts": ("[Twice]", *SAMPLES),
    "training.samples.max_new_tokens": ("6", *SAMPLES),
    "training.samples.temperature": ("0.1", *SAMPLES),
    "training.influence.enabled": ("false", *INFLUENCED),
    "training.influence.update_interval": ("2", *INFLUENCED),
    "training.influence.warmup_steps": ("3", *INFLUENCED),
    "training.influence.learning_rate": ("0.1", *INFLUENCED),
    "training.influence.min_weight": ("0.2", *INFLUENCED),
    "training.influence.max_weight": ("0.3", *INFLUENCED),
    "training.influence.noise": ("1000", *INFLUENCED),
    "training.influence.num_samples": ("4", *INFLUENCED),
    "training.non_finite.max_skipped": (
        "1",
        "training.optimizer.lr_adam=1e30",
        "training.optimizer.type=adamw",
    ),
    "training.logging.log_interval": ("2",),
    "training.logging.ternary_interval": ("2",),
    "training.logging.wandb.enabled": ("true",),
    "training.logging.wandb.project": ("another", WANDB),
    "training.logging.wandb.entity": ("another", WANDB),
    "training.logging.wandb.name": ("another", WANDB),
    "training.logging.wandb.tags": ("[another]", WANDB),
    "training.logging.wandb.timeout_seconds": ("3", WANDB),
    "gpu.name": ("bigger", *PROFILE, "model.name=another"),
    "gpu.micro_batches": (".tiny_llama.alone=64", *PROFILE),
    "gcs.enabled": ("false", *BUCKET),
    "gcs.bucket": ("file://{bucket}/deeper", *BUCKET),
    "gcs.timeout_seconds": ("1e-9", *BUCKET),
    "data.config_name": ("none_such",),
    "data.directory": ("{empty}",),
    "data.window_samples": ("8",),
    "data.num_workers": ("1",),
    "distributed.strategy": ("ddp", RANKS),
    "distributed.timeout_seconds": ("7", RANKS, "distributed.strategy=ddp"),
}
"""Key → its other value, then what the run beside it needs to feel it."""


@dataclasses.dataclass
class Seen:
    """What a run built, caught as it begins."""

    trainer: pl.Trainer | None = None
    module: Any = None
    num_workers: int = 0
    num_compiled: int = 0
    wandb_job: Path | None = None

    def fit(self) -> Any:
        """`Trainer.fit`, seen."""
        usual = pl.Trainer.fit

        def fit(trainer: pl.Trainer, module: Any, *arguments: Any, **named: Any) -> Any:
            self.trainer, self.module = trainer, module
            return usual(trainer, module, *arguments, **named)

        return fit

    def pool(self) -> Any:
        """`WorkerPool`, seen."""

        def pool(*arguments: Any, **named: Any) -> WorkerPool:
            self.num_workers = named["num_workers"]
            return WorkerPool(*arguments, **named)

        return pool

    def compile(self) -> Any:
        """`Module.compile`, seen; nothing is compiled."""

        def compile_(*arguments: Any, **named: Any) -> None:
            self.num_compiled += 1

        return compile_

    def processes(self, job: Path) -> Any:
        """`subprocess` for W&B: the process writes down what it is told."""

        def start(command: object, **named: Any) -> subprocess.Popen[str]:
            self.wandb_job = job
            return subprocess.Popen([sys.executable, "-c", WRITE_DOWN, str(job)], **named)

        return types.SimpleNamespace(**(vars(subprocess) | {"Popen": start}))


WRITE_DOWN = "import sys; open(sys.argv[1], 'w').write(sys.stdin.readline()); sys.stdin.read()"


class NamesItsModel(http.server.BaseHTTPRequestHandler):
    """A server that has a model, and never says more of it."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "one"}]}')

    def do_POST(self) -> None:
        time.sleep(1)

    def log_message(self, *_: object) -> None:
        pass


class Runs:
    """Runs in one directory; of equal ones there is one."""

    def __init__(self, base: Path, server: str) -> None:
        self.base = base
        self.server = server
        self.known: dict[tuple[str, ...], dict[str, Any]] = {}
        self.first = run(
            load_config(self.overrides("training.max_steps=2", output_dir=base / "first"))
        ).directory

    def overrides(self, *more: str, output_dir: Path) -> list[str]:
        """The last word on each key holds, and `~` is none."""
        each = [*SMALL, f"output_dir={output_dir}", *more]
        last = {word.partition("=")[0]: word for word in each}
        return [word for word in last.values() if not word.endswith("=~")]

    def shown(self, *more: str) -> dict[str, Any]:
        """What a run shows of itself, or the line that refuses it."""
        if more not in self.known:
            self.known[more] = self.freshly_shown(*more)
        return self.known[more]

    def freshly_shown(self, *more: str) -> dict[str, Any]:
        here = self.base / str(len(list(self.base.iterdir())))
        here.mkdir()
        if AGAIN in more:
            shutil.copytree(self.base / "first", here / "copy")
        places = {
            "{first}": str(self.first / "checkpoints" / "final"),
            "{copy}": str(here / "copy"),
            "{empty}": str(here / "empty"),
            "{bucket}": str(here / "bucket"),
            "{server}": self.server,
        }
        words = [
            functools.reduce(lambda text, place: text.replace(*place), places.items(), word) for word in more
        ]
        seen, printed = Seen(), io.StringIO()
        try:
            with watched(seen, printed, here / "job.json", several=RANKS in more):
                config = load_config(
                    self.overrides(*(w for w in words if w != RANKS), output_dir=here / "out")
                )
                directory = run(config).directory
        except UserError as error:
            return {"refused": str(error).replace(str(here), "")}
        assert seen.trainer is not None
        return {
            "directory": str(directory).replace(str(here), ""),
            "lines": TIMED.sub("#", printed.getvalue().replace(str(here), "")),
            "workers": seen.num_workers,
            "compiled": seen.num_compiled,
            "told W&B": told(seen.wandb_job),
            "bucket": sorted(str(path.relative_to(here)) for path in here.glob("bucket/**/*")),
            "data": sorted(path.name for path in here.glob("empty/*")),
            **built(seen.trainer, seen.module),
            **left(directory),
        }


@contextlib.contextmanager
def watched(seen: Seen, printed: io.StringIO, job: Path, *, several: bool) -> Iterator[None]:
    """What is built is seen, what is printed is kept; with `several`, ranks are about to meet."""
    logger, handler = logging.getLogger("wrinklefree"), logging.StreamHandler(printed)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(pl.Trainer, "fit", seen.fit())
            patch.setattr("data_handler.loaders.WorkerPool", seen.pool())
            patch.setattr(torch.nn.Module, "compile", seen.compile())
            patch.setattr("wrinklefree.training.wandb_process.subprocess", seen.processes(job))
            if several:
                patch.setenv("WORLD_SIZE", "2")
                patch.setattr(torch.distributed, "init_process_group", refuse_to_join)
            yield
    finally:
        logger.removeHandler(handler)


def told(job: Path | None) -> dict[str, Any]:
    """What W&B would be told besides the configuration, and but for what differs anyway."""
    if job is None:
        return {}
    content = json.loads(job.read_text())
    name = content["identity"]["name"].partition("-")[0]  # what follows is made of the configuration
    return {"name": name} | {
        key: value for key, value in content.items() if key not in ("config", "identity", "directory")
    }


def refuse_to_join(backend: str, **named: Any) -> None:
    raise UserError(f"would join with {backend} and {named}")


def built(trainer: pl.Trainer, module: Any) -> dict[str, Any]:
    """Modules, optimizer groups, trainer and callbacks."""
    weights = (parameter.detach().float().numpy().tobytes() for parameter in module.model.parameters())
    groups = module.optimizer.param_groups
    return {
        "modules": str(module.model),
        "optimizer": [{name: value for name, value in group.items() if name != "params"} for group in groups],
        "trainer": [str(trainer.precision), type(trainer.strategy).__name__],
        "callbacks": [type(each).__name__ for each in trainer.callbacks],  # type: ignore[attr-defined]
        "weights": hashlib.sha256(b"".join(weights)).hexdigest(),
    }


def left(directory: Path) -> dict[str, Any]:
    """Files, rows and texts."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {
        "rows": [{name: value for name, value in row.items() if name not in VOLATILE} for row in rows],
        "files": sorted(str(path.relative_to(directory)) for path in directory.rglob("*")),
        "texts": [path.read_text() for path in directory.glob("samples.jsonl")],
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NamesItsModel) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield Runs(tmp_path_factory.mktemp("runs"), f"http://127.0.0.1:{server.server_address[1]}")
            server.shutdown()


def test_each_key_of_the_schema_is_walked() -> None:
    assert set(WALKED) == {key for key, _, _ in schema_keys()}


@pytest.mark.slow
def test_the_same_again_shows_the_same(runs: Runs) -> None:
    everything = (
        *VALIDATED,
        *SAMPLES,
        *INFLUENCED,
        *BUCKET,
        SUBLN,
        WANDB,
        "training.logging.ternary_interval=1",
    )

    assert runs.freshly_shown(*everything) == runs.freshly_shown(*everything)


@pytest.mark.slow
@pytest.mark.parametrize("key", WALKED)
def test_another_value_shows(runs: Runs, key: str) -> None:
    value, *beside = WALKED[key]

    before = runs.shown(*beside)
    after = runs.shown(*beside, key + value if value.startswith(".") else f"{key}={value}")

    assert before != after, f"nobody reads {key}"
    assert "refused" not in before or "refused" not in after or before["refused"] != after["refused"]
