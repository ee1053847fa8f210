"""Text from a decoder: token after token, or block after block by filling in [MASK].

from wrinklefree.generation import Decoding, generate_ids, open_decoder

decoder = open_decoder("outputs/…/unified_checkpoint")
answer = generate_ids(decoder.model, decoder.encode("Once"), Decoding(max_new_tokens=64))
print(decoder.tokenizer.decode(answer.tokens), answer.tokens_per_forward)
"""

from wrinklefree.decoding import Decoding, Mode
from wrinklefree.generation.generate import Generated, generate_ids, stream_ids
from wrinklefree.generation.opening import Decoder, open_decoder
from wrinklefree.generation.prefix import Prefix
from wrinklefree.generation.text import text_pieces

__all__ = [
    "Decoder",
    "Decoding",
    "Generated",
    "Mode",
    "Prefix",
    "generate_ids",
    "open_decoder",
    "stream_ids",
    "text_pieces",
]
