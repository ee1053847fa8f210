"""`wrinklefree chat`: question and answer in turn, with the chat template of the tokenizer.

The model keeps the keys and values of what it has read, so a turn reads what is new in it.
"""

import contextlib
import sys

import torch

from durable import UserError, error_line
from wrinklefree.commands.asking import FORGOTTEN, next_question
from wrinklefree.generation import Decoding, Prefix, open_decoder
from wrinklefree.generation.generate import check_request
from wrinklefree.generation.opening import Decoder, Message
from wrinklefree.generation.speaking import Speaker


def chat(name: str, *, decoding: Decoding, stream: bool) -> None:
    """Answer lines of stdin until it ends or says /exit. Ctrl-C stops an answer, else the chat."""
    decoder = open_decoder(name)
    ends = decoder.chat_ends()
    # What this model cannot do at all is said before anybody types.
    check_request(decoder.model, decoder.encode_chat([{"role": "user", "content": ""}]), decoding)
    speaker = Speaker(decoder, decoding, stream)
    prefix = Prefix(decoder.model, cached=decoding.prefix_cache)
    generator = torch.Generator().manual_seed(decoding.seed)
    history: list[Message] = []
    try:
        while (line := next_question()) is not None:
            question = {"role": "user", "content": line}
            try:
                history, prompt = _fitting([*history, question], decoder, decoding)
            except UserError as error:
                print(error_line(error), file=sys.stderr)
                continue
            with contextlib.suppress(KeyboardInterrupt):
                speaker.say(prefix, prompt, ends=ends, generator=generator)
            history.append({"role": "assistant", "content": speaker.answer})
    finally:
        speaker.print_speed()


def _fitting(
    messages: list[Message], decoder: Decoder, decoding: Decoding
) -> tuple[list[Message], list[int]]:
    """The messages and their tokens, without the oldest turns where the model has no positions for all."""
    while True:
        prompt = decoder.encode_chat(messages)
        try:
            check_request(decoder.model, prompt, decoding)
        except UserError:
            if len(messages) == 1:
                raise
        else:
            return messages, prompt
        print(FORGOTTEN, file=sys.stderr)
        messages = messages[2:]
