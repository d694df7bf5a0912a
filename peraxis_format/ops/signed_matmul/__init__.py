"""Inputs times the sum of components, without the weights: torch, numba, triton."""
