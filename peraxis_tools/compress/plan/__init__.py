"""Which encoding for which tensor, and how many bytes it may take."""
