"""Where earlier documents import it from; it lives in `wrinklefree.training.wandb_tracker`."""

from wrinklefree.training.wandb_tracker import InferenceMetrics, WandBTracker, create_inference_tracker

__all__ = ["InferenceMetrics", "WandBTracker", "create_inference_tracker"]
