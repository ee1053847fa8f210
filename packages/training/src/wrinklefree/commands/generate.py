"""`wrinklefree generate`: go on from prompts, token after token or by block diffusion."""

from collections.abc import Sequence

import torch

from wrinklefree.commands.asking import text_of_stdin
from wrinklefree.generation import Decoding, Prefix, open_decoder
from wrinklefree.generation.generate import check_request
from wrinklefree.generation.speaking import Speaker


def generate(name: str, *, prompts: Sequence[str], decoding: Decoding, stream: bool) -> None:
    """Print what follows each prompt; without one, what follows stdin."""
    texts = prompts or [text_of_stdin()]
    decoder = open_decoder(name)
    encoded = [decoder.encode(text) for text in texts]
    for prompt in encoded:
        check_request(decoder.model, prompt, decoding)
    speaker = Speaker(decoder, decoding, stream)
    try:
        for number, prompt in enumerate(encoded):
            if number:
                print()
            prefix = Prefix(decoder.model, cached=decoding.prefix_cache)
            # Each starts with the seed: what follows a prompt does not depend on the others.
            generator = torch.Generator().manual_seed(decoding.seed)
            speaker.say(prefix, prompt, ends=decoder.ends, generator=generator)
    finally:
        speaker.print_speed()
