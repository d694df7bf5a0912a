"""How much two sign masks differ, weighted by columns: numpy (the reference), numba."""
