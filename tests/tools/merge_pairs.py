"""Deltas on one base for the tests of merge, and their dense form."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

import peraxis_format as pxd
from tests.factories import base_ref, random_storage, sign_module

AXES = st.lists(st.sampled_from(list(pxd.Axis)), min_size=1, max_size=3).map(tuple)
SHAPES = st.sampled_from([(3, 5), (8, 64), (17, 72), (2, 4, 9), (1, 8)])
BF16 = pxd.DType.BF16


def dense(module: pxd.ModuleDelta) -> np.ndarray:
    """Return the delta in F64, computed only from the formula of SPEC 5.3."""
    total = np.zeros(module.covered)
    for c in module.components:
        signs = np.where(pxd.unpack_signs(c.mask, module.shape[-1]), 1.0, -1.0)
        row = 1.0 if c.row is None else c.row.astype(np.float64)[..., :, None]
        col = 1.0 if c.col is None else c.col.astype(np.float64)[..., None, :]
        scalar = 1.0 if c.scalar is None else float(c.scalar[0])
        total += signs * row * col * scalar * 2.0**c.exponent
    return total


def exact(name: str, base: pxd.Array | None, value: pxd.Array) -> pxd.ModuleDelta:
    ref = None if base is None else base_ref(base, BF16)
    return pxd.ModuleDelta(name=name, shape=value.shape, dtype=BF16, encoding=pxd.Encoding.FULL, base=ref, full=value)


def pair_of_deltas(seed: int, shape, axes_a, axes_b):
    rng = np.random.default_rng(seed)
    base = random_storage(rng, shape)
    return base, sign_module(rng, "m.weight", base, axes=axes_a), sign_module(rng, "m.weight", base, axes=axes_b)
