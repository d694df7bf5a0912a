"""Plug-ins for serving engines: the engine loads, swaps and serves fine-tunes from .pxd files."""
