"""Token after token: each comes from the logits behind all before it."""

from collections.abc import Collection, Iterator, Sequence

from wrinklefree.generation.choice import Choice
from wrinklefree.generation.prefix import Prefix


def autoregressive(
    prefix: Prefix, prompt: Sequence[int], *, num_new: int, choice: Choice, ends: Collection[int]
) -> Iterator[list[int]]:
    """Gives every token as it is chosen; the last one may be one of `ends`."""
    unread = list(prompt[len(prefix) :])
    for _ in range(num_new):
        token = choice.one(prefix.read(unread))
        yield [token]
        if token in ends:
            return
        unread = [token]
