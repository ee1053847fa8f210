"""Text of tokens as they come. A character whose bytes lie in several tokens waits for all of them."""

from collections.abc import Iterable, Iterator
from itertools import chain

from transformers import PreTrainedTokenizerBase

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers write for bytes that are no character, or not yet."""
MOST_BYTES = 4
"""Of a character."""


def text_pieces(tokenizer: PreTrainedTokenizerBase, chunks: Iterable[list[int]]) -> Iterator[str]:
    """Pieces that joined are the text of all tokens, special ones left out. Never half a character."""
    # Some tokenizers write a token differently at the start of a text: what was shown last is decoded again.
    shown_last: list[int] = []
    waiting: list[int] = []
    text, num_shown = "", 0
    for token in chain.from_iterable(chunks):
        waiting.append(token)
        text = _decoded(tokenizer, shown_last + waiting)
        is_whole = not text.endswith(BROKEN)
        if not is_whole and len(waiting) < MOST_BYTES:
            continue
        # So many bytes without a character: some are broken, but the last ones may still become one.
        certain = text if is_whole else _without_last(text)
        if len(certain) > num_shown:
            yield certain[num_shown:]
            num_shown = len(certain)
            if is_whole:
                shown_last, waiting = waiting, []
                text = _decoded(tokenizer, shown_last)
                num_shown = len(text)
    if len(text) > num_shown:
        yield text[num_shown:]


def _decoded(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _without_last(text: str) -> str:
    for _ in range(MOST_BYTES - 1):
        text = text.removesuffix(BROKEN)
    return text
