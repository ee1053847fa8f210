"""Who is imitated: a model that runs here, one behind HTTP, or what either said before, on disk."""
