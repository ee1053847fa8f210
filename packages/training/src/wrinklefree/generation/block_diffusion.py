"""Block after block, several tokens per forward (Fast-dLLM v2, arXiv 2509.26328).

    prefix   clean tokens of all blocks before, read causally; their keys and values are kept
    block    its first token comes from the prefix's next-token logits, as training masks no first token
             [ known … | MASK MASK … ] is looked at again and again; the token at i is predicted at i − 1

Blocks count from the start of the prompt; what the prompt has of its last block is given. Every look takes
all masked tokens of the present sub-block that the model is confident about, at least one. A block that is
complete is read, and becomes part of the prefix.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from bitnet_arch import BlockDiffusion
from wrinklefree.generation.choice import Choice
from wrinklefree.generation.prefix import Prefix


@dataclass(frozen=True, slots=True, kw_only=True)
class Filling:
    """How masks are filled in."""

    diffusion: BlockDiffusion
    sub_block: int
    threshold: float
    choice: Choice
    """Never gives [MASK]."""
    ends: Collection[int]


def block_diffusion(
    prefix: Prefix, prompt: Sequence[int], filling: Filling, *, num_new: int, longest: int | None
) -> Iterator[list[int]]:
    """Gives tokens as soon as all before them are known; the last one may be one of `ends`."""
    block_size, end = filling.diffusion.block_size, len(prompt) + num_new
    tokens = list(prompt)
    while len(tokens) < end:
        start = len(tokens) - len(tokens) % block_size
        if len(tokens) == start:
            first = filling.choice.one(prefix.read(tokens[len(prefix) :]))
            found: Iterator[list[int]] = iter([[first]])
        else:
            if len(prefix) < start:
                prefix.read(tokens[len(prefix) : start])
            # Whole also where less is wanted of it, as in training; but positions may run out.
            size = block_size if longest is None else min(block_size, longest - start)
            found = filled(prefix, tokens[start:], filling, size=size, wanted=min(end - start, size))
        for new in found:
            tokens += new
            yield new
        if tokens[-1] in filling.ends:
            return


def filled(
    prefix: Prefix, given: Sequence[int], filling: Filling, *, size: int, wanted: int
) -> Iterator[list[int]]:
    """The tokens behind those given, up to place `wanted` or the first that ends the text."""
    mask = filling.diffusion.mask_token_id
    block = [*given, *[mask] * (size - len(given))]
    num_shown = len(given)
    masked = list(range(num_shown, wanted))
    for sub_end in range(filling.sub_block, size + filling.sub_block, filling.sub_block):
        while places := [place for place in masked if place < sub_end]:
            logits_LV = prefix.look(block)
            tokens, confidence = filling.choice(logits_LV[[place - 1 for place in places]])
            taken = confidence > filling.threshold
            taken[confidence.argmax()] = True
            for place, token, is_taken in zip(places, tokens.tolist(), taken.tolist(), strict=True):
                block[place] = token if is_taken else mask
            ending = (place + 1 for place in range(len(given), wanted) if block[place] in filling.ends)
            wanted = next(ending, wanted)
            masked = [place for place in range(num_shown, wanted) if block[place] == mask]
            num_known = masked[0] if masked else wanted
            if num_known > num_shown:
                yield block[num_shown:num_known]
                num_shown = num_known
