"""WrinkleFree takes a pretrained decoder to a ternary one. Its door is the command line, `wrinklefree`."""

__version__ = "0.1.0"
__all__ = ["__version__"]
