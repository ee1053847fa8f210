"""Random numbers of a micro-batch depend on where it stands, never on what was drawn before it.

So a run that goes on after a kill draws what the uninterrupted one drew, and whatever happens between two
steps (validation, influence) leaves no trace.
"""

from hashlib import blake2b

import torch


def seed_for(seed: int, *place: int | str) -> int:
    """A 63-bit seed for a place of the run."""
    text = "/".join(map(str, (seed, *place)))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_micro_batch(seed: int, *, step: int, micro_batch: int, rank: int) -> None:
    """Draw from here on what belongs to one micro-batch."""
    torch.manual_seed(seed_for(seed, "micro-batch", step, micro_batch, rank))
