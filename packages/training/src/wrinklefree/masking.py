"""Secrets out of whole trees, and out of every line that is logged."""

import logging
from collections.abc import Mapping
from typing import Any

from durable import mask_secrets
from durable.masking import MASK, is_secret_name


def masked(value: Any, name: str = "") -> Any:
    """The same tree with `***` for what a name or its own look gives away as a credential."""
    if isinstance(value, Mapping):
        return {key: masked(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item, name) for item in value]
    if isinstance(value, str):
        return MASK if value and is_secret_name(name) else mask_secrets(value)
    return value


class MaskingFormatter(logging.Formatter):
    """Traceback included."""

    def format(self, record: logging.LogRecord) -> str:
        return mask_secrets(super().format(record))
