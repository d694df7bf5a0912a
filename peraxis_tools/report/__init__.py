"""The only layer that prints: rich text or versioned JSON of a result, progress, errors."""
