"""How much memory this process uses."""

import os
import resource
import sys
from pathlib import Path

import torch


def memory_in_use(device: torch.device) -> int:
    """Bytes: on a GPU the most that tensors took so far, else what of the process is in memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
