"""The run as Lightning sees it: a module, a data module, and callbacks."""
