"""What a ternary checkpoint weighs, and which engine formats hold it: from file headers, no tensor loaded."""

from bitnet_serving.formats import BlockFormat
from bitnet_serving.safetensors_header import StoredTensor, read_checkpoint_header
from bitnet_serving.sizes import FORMATS, Sizes, read_sizes

__version__ = "0.1.0"
__all__ = ["FORMATS", "BlockFormat", "Sizes", "StoredTensor", "read_checkpoint_header", "read_sizes"]
