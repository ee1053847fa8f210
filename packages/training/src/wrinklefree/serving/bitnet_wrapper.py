"""A door to `bitnet_serving`: a model served, asked, or asked once."""

from bitnet_serving.client import BitNetClient
from bitnet_serving.server import BitNetInference, BitNetServer

__all__ = ["BitNetClient", "BitNetInference", "BitNetServer"]
