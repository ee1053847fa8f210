"""Read what runs left behind: a door to `durable.metrics`, which packages below this one read, too."""

from durable.metrics import METRICS_VERSION, read_metrics

__all__ = ["METRICS_VERSION", "read_metrics"]
