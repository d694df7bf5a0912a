"""What a merge does to blocks of rows: numpy (the reference), numba."""
