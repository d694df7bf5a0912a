"""What is done to weights: one folder an operation, one file a backend, one law for all backends."""
