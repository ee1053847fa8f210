"""What a run writes down beside checkpoints: configuration, fingerprint, metrics; and who else is told."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from wrinklefree.config import RunConfig, to_dict, to_yaml
from wrinklefree.training.data import PreparedData
from wrinklefree.training.metrics import MetricsWriter
from wrinklefree.training.run_directory import RunDirectory
from wrinklefree.training.run_fingerprint import write_fingerprint
from wrinklefree.training.wandb_process import WandBProcess


@contextmanager
def recorded(config: RunConfig, directory: RunDirectory, data: PreparedData) -> Iterator[MetricsWriter]:
    """For rank 0: `config.yaml`, `fingerprint.json`, `metrics.jsonl` and `.csv`, and W&B if wanted."""
    keys, wandb = to_dict(config), config.training.logging.wandb
    (directory.path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    write_fingerprint(directory.path, keys, data.fingerprints())
    with ExitStack() as closing:
        writer = MetricsWriter(directory.metrics)
        if wandb.enabled:
            closing.callback(WandBProcess.start(keys, wandb, directory.path).close)
        closing.callback(writer.close)
        yield writer
