"""Names under which earlier documents import things; each leads to where it lives now."""
