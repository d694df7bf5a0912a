"""Signs of the delta of a matrix pair and its absolute sums: numpy (the reference), numba."""
