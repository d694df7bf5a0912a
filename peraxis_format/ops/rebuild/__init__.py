"""Base + components -> weights (SPEC 6): numpy (the reference), numba, torch, triton."""
