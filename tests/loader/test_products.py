"""Products of inputs with components are within the stated bound of float64, with the same bits for any threads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peraxis_format import mask_width
from peraxis_format.dtypes import Array

products = pytest.importorskip("peraxis_format.ops.signed_matmul.numba", reason="numba is not installed")


def random_product(rng: np.random.Generator, rows: int, width: int, inputs: int, components: int) -> products.Product:
    """Return random signs, scales and inputs, and an output with values."""
    masks = []
    for _ in range(components):
        mask = rng.integers(0, 256, (rows, mask_width(width)), dtype=np.uint8)
        if width % 8:
            mask[:, -1] &= (1 << width % 8) - 1
        masks.append(mask)

    def floats(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    return products.Product(
        masks=masks,
        rows=[np.abs(floats(rows)) for _ in masks],
        columns=[np.abs(floats(width)) for _ in masks],
        inputs=floats(inputs, width),
        out=floats(inputs, rows),
    )


def exact(product: products.Product) -> tuple[Array, Array]:
    """Return the added product in float64, and the sum of its magnitudes."""
    total, size = np.zeros(product.out.shape), np.zeros(product.out.shape)
    width = product.inputs.shape[1]
    for mask, row, column in zip(product.masks, product.rows, product.columns, strict=True):
        signs = np.unpackbits(mask, axis=-1, count=width, bitorder="little") * 2.0 - 1.0
        weighted = product.inputs.astype(np.float64) * column
        total += (weighted @ signs.T) * row
        size += np.abs(weighted).sum(1, keepdims=True) * row
    return total, size


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 20),
    width=st.one_of(st.integers(1, 90), st.integers(2040, 2100)),
    inputs=st.integers(1, 11),
    components=st.integers(1, 3),
)
def test_products_are_those_of_the_rebuilt_terms(
    seed: int, rows: int, width: int, inputs: int, components: int
) -> None:
    product = random_product(np.random.default_rng(seed), rows, width, inputs, components)
    before = product.out.copy()
    added, size = exact(product)
    products.add_products([product])
    error = np.abs(product.out - (before + added))
    assert np.all(error <= 2.0**-24 * ((width + 4) * size + 2 * components * (np.abs(before) + size)))


def test_threads_and_blocks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for threads, job in ((1, 1 << 24), (2, 1 << 10), (3, 1)):
        monkeypatch.setattr(products, "_JOB", job)
        several = [random_product(np.random.default_rng(seed), 37, 200, 5, 2) for seed in range(3)]
        # The output is a slice of a larger one, as for a fused weight.
        wide = np.zeros((5, 50), np.float32)
        several[1] = products.Product(
            several[1].masks, several[1].rows, several[1].columns, several[1].inputs, wide[:, 7:44]
        )
        products.add_products(several, threads=threads)
        found.append(b"".join(product.out.tobytes() for product in several))
    assert found[0] == found[1] == found[2]
