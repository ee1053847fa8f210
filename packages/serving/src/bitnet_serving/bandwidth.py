"""How fast this machine reads its memory: the best of several passes over more than its caches hold."""

import time

import torch

READ_BYTES = 512 * 2**20
PASSES = 5


def memory_bandwidth(*, threads: int, num_bytes: int = READ_BYTES, passes: int = PASSES) -> float:
    """Bytes a second that so many threads read together."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        numbers = torch.ones(num_bytes // 4)
        return numbers.nbytes / min(_seconds_to_add(numbers) for _ in range(passes))
    finally:
        torch.set_num_threads(before)


def _seconds_to_add(numbers: torch.Tensor) -> float:
    begun = time.perf_counter()
    numbers.sum()
    return time.perf_counter() - begun
