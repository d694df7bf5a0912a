"""Many variants of one model in one batch, over one copy of the base."""
