"""The steps of the sign search within one block of columns: torch (the reference), numba, triton."""
