"""Files that are there whole or not at all; errors a user can act on."""

from durable.errors import ExitCode, UserError, error_line
from durable.masking import mask_secrets

__all__ = ["ExitCode", "UserError", "error_line", "mask_secrets"]
