"""Training data whose order is a function of a seed: the sorting task that `wrinklefree demo` learns."""

from data_handler.sorting import HELD_OUT, NUM_SAMPLES, Batch, decode, encode, sorting_batch

__version__ = "0.1.0"
__all__ = ["HELD_OUT", "NUM_SAMPLES", "Batch", "decode", "encode", "sorting_batch"]
