"""Names that are known from before, for what `bitnet_serving` does."""
