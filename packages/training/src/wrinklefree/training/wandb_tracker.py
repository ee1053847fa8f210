"""Weights & Biases: `WandBTracker` is the only place that calls its library.

Without a key, or where the server does not answer within seconds, a tracker writes offline (`wandb sync`
sends it later). Switched off, or without the library, every call does nothing. What it is given is masked.
"""

import logging
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from durable import mask_secrets
from wrinklefree.masking import masked
from wrinklefree.training.run_naming import (
    generate_benchmark_name,
    generate_moe_benchmark_name,
    generate_run_name,
)

logger = logging.getLogger(__name__)
ANSWER_SECONDS = 3.0
"""How long the server may take to answer at all."""
INIT_SECONDS = 15.0
"""How long it may take to register a run."""


@dataclass(kw_only=True)
class InferenceMetrics:
    """What a measurement of inference found."""

    tokens_per_sec_prompt: float
    tokens_per_sec_gen: float
    latency_first_token_ms: float
    latency_per_token_ms: float
    peak_memory_gb: float
    num_threads: int
    batch_size: int
    model_name: str
    quant_type: str
    context_size: int
    num_experts: int = 0
    top_k: int = 0
    router_type: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """`inference/…` what was measured, `config/…` of what, `moe/…` of which experts."""
        values = asdict(self)
        extra = values.pop("extra")
        moe = {name: values.pop(name) for name in ("num_experts", "top_k", "router_type")}
        config = {
            name: values.pop(name)
            for name in ("num_threads", "batch_size", "model_name", "quant_type", "context_size")
        }
        found = {f"inference/{name}": value for name, value in values.items()}
        found |= {f"config/{name}": value for name, value in config.items()}
        if moe["num_experts"]:
            found |= {f"moe/{name}": value for name, value in moe.items()}
        return found | {f"inference/{name}": value for name, value in extra.items()}


class WandBTracker:
    """One run on W&B at a time."""

    def __init__(
        self,
        project: str = "wrinklefree",
        entity: str | None = None,
        enabled: bool = True,
        tags: Sequence[str] | None = None,
        *,
        directory: Path | None = None,
        finish_seconds: float = 10.0,
    ) -> None:
        self.project, self.entity, self.tags = project, entity, list(tags or ())
        self.directory = directory
        self.finish_seconds = finish_seconds
        self.enabled = enabled and os.environ.get("WANDB_MODE") != "disabled"
        self._run: Any = None

    def init_training_run(self, config: Any, name: str | None = None, *, run_id: str | None = None) -> Any:
        """Begin a run, or go on with the one of that id; gives the library's run, or None."""
        return self._begin(config, name or generate_run_name(config), run_id)

    def init_benchmark_run(
        self,
        model_name: str,
        quant_type: str,
        context_size: int,
        num_threads: int,
        batch_size: int = 1,
        num_experts: int = 0,
        top_k: int = 0,
        name: str | None = None,
    ) -> Any:
        """Begin a run for a measurement of inference."""
        if name is None and num_experts:
            name = generate_moe_benchmark_name(
                model_name, num_experts, top_k, quant_type, context_size, num_threads
            )
        config = {
            "model_name": model_name,
            "quant_type": quant_type,
            "context_size": context_size,
            "num_threads": num_threads,
            "batch_size": batch_size,
            "num_experts": num_experts,
            "top_k": top_k,
        }
        return self._begin(
            config, name or generate_benchmark_name(model_name, quant_type, context_size, num_threads), None
        )

    def log_training_step(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """One row. `step` is W&B's own counter, which only grows; without it, rows are counted."""
        if self._run is not None:
            self._run.log(masked(dict(values)), step=step)

    def log_summary(self, values: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._run.summary.update(masked(dict(values)))

    def log_inference_metrics(self, metrics: InferenceMetrics) -> None:
        self.log_training_step(metrics.to_dict())

    def log_benchmark_results(self, results: Mapping[str, Any]) -> None:
        """Final numbers of a measurement."""
        self.log_summary({f"benchmark/{name}": value for name, value in results.items()})

    def finish(self) -> None:
        """Send what is left, for `finish_seconds` at most; the rest stays on this disk."""
        run, self._run = self._run, None
        if run is not None:
            run.finish()

    @property
    def place(self) -> str:
        """Where the run can be looked at."""
        if self._run is None:
            return "off"
        return str(self._run.url) if self._run.url else f"offline, {Path(self._run.dir).parent}"

    def _begin(self, config: Any, name: str, run_id: str | None) -> Any:
        if not self.enabled:
            return None
        try:
            import wandb
        except ImportError:
            logger.warning("W&B is not installed: pip install 'wrinklefree[wandb]'")
            return None
        settings = wandb.Settings(
            console="off",  # lines may hold what only our own writers mask
            disable_code=True,
            disable_git=True,  # remotes may hold credentials; fingerprint.json has the commit
            finish_timeout=self.finish_seconds,
            init_timeout=INIT_SECONDS,
            silent=True,
        )
        wanted = {
            "project": self.project,
            "entity": self.entity,
            "tags": self.tags or None,
            "name": name,
            "id": run_id,
            "resume": "allow" if run_id else None,
            "config": masked(_plain(config)),
            "dir": str(self.directory) if self.directory else None,
            "settings": settings,
        }
        why = _why_offline(str(wandb.setup().settings.base_url))
        if why is None:
            try:
                self._run = wandb.init(mode="online", **wanted)
            except Exception as error:
                # Its errors have no common base that is public; whatever it is, the run goes on.
                why = f"{type(error).__name__}: {error}"
        if self._run is None:
            logger.warning("W&B writes offline: %s", mask_secrets(str(why)))
            self._run = wandb.init(mode="offline", **wanted)
        self._run.define_metric("*", step_metric="step")
        return self._run


def create_inference_tracker(
    model: str,
    quant: str,
    ctx: int,
    threads: int,
    project: str = "wrinklefree-inference",
    **options: Any,
) -> WandBTracker:
    """A tracker whose run for this measurement has begun."""
    tracker = WandBTracker(project=project, **options)
    tracker.init_benchmark_run(model, quant, ctx, threads)
    return tracker


def _why_offline(base_url: str) -> str | None:
    """None when the server answers anything but a failure of its own."""
    if os.environ.get("WANDB_MODE") == "offline":
        return "WANDB_MODE=offline"
    try:
        with urllib.request.urlopen(base_url, timeout=ANSWER_SECONDS):
            return None
    except urllib.error.HTTPError as error:
        return None if error.code < 500 else f"{base_url} answers {error.code}"
    except (OSError, ValueError) as error:
        return f"{base_url} does not answer ({error})"


def _plain(config: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
