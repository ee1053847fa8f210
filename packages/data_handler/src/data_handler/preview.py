"""The first documents of a source as text, with their borders and masks visible."""

from collections.abc import Iterator
from itertools import islice

from data_handler.config import DataConfig
from data_handler.encoder import TextEncoder
from data_handler.pieces import Document, read_documents
from data_handler.sources import plan_source

_LONGEST = 600
"""Characters of a document that are shown."""


def preview_source(name: str, config: DataConfig, encoder: TextEncoder, num_documents: int) -> Iterator[str]:
    """Each document as decoded from its tokens, then its end, its size and a line of ~ under masked text."""
    source = config.sources[name]
    shown = 0
    for piece in plan_source(name, source, config).pieces:
        documents = read_documents(name, source, piece, encoder, max_line_bytes=config.max_line_bytes)
        for document in islice(documents, num_documents - shown):
            shown += 1
            yield _shown(document, encoder)
        if shown == num_documents:
            return


def _shown(document: Document, encoder: TextEncoder) -> str:
    (ids,) = encoder.encode([document.text])
    end = encoder.decode([encoder.eos_token_id])
    text = encoder.decode(ids.tolist())[:_LONGEST]
    if document.spans is not None:
        text = _underlined(text, document.spans)
    more = " …" if len(document.text) > _LONGEST else ""
    return f"{text}{more}{end}\n   └ {len(ids) + 1:,} tokens; the first has no label"


def _underlined(text: str, spans: tuple[tuple[int, int], ...]) -> str:
    lines, position = [], 0
    for line in text.split("\n"):
        marks = (
            " " if any(start <= place < stop for start, stop in spans) else "~"
            for place in range(position, position + len(line))
        )
        lines += [line, *([mask] if (mask := "".join(marks).rstrip()) else [])]
        position += len(line) + 1
    return "\n".join(lines)
