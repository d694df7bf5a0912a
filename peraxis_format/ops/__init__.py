"""Operations on weights: one folder for each operation, one file for each backend, one law for all backends."""
