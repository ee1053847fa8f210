"""Influence: which examples and sources help a probe, and mixture weights that follow it."""
