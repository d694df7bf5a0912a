"""The sensitivities that decide the byte budget: inner products with packed masks, and their memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peraxis_format import DType
from peraxis_tools.compress.fit.mean import mean_components
from peraxis_tools.compress.plan.sensitivity import in_pieces, inner_products
from tests.factories import dense_component


@given(batch=st.sampled_from([(), (3,)]), d_out=st.integers(1, 9), d_in=st.integers(1, 40), masks=st.integers(0, 4))
def test_products_with_packed_masks_are_those_with_dense_terms(
    batch: tuple[int, ...], d_out: int, d_in: int, masks: int
) -> None:
    g = np.random.Generator(np.random.PCG64(d_out * d_in + masks))
    base, tuned, gradient = (g.standard_normal((*batch, d_out, d_in)).astype(np.float32) for _ in range(3))
    components = mean_components(base, tuned, base_dtype=DType.F32, dtype=DType.F32, axis=None, components=masks)
    deltas = torch.from_numpy((tuned - base).reshape(-1, d_out, d_in))
    found = inner_products(torch.from_numpy(gradient), lambda e, rows: deltas[e, rows], components)
    rest = (tuned - base).astype(np.float64)
    expected = [float((gradient * rest).sum())]
    for component in components:
        rest = rest - dense_component(component, rest.shape)
        expected.append(float((gradient * rest).sum()))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_products_take_less_memory_than_one_dense_term() -> None:
    base, tuned = (np.random.default_rng(i).standard_normal((4096, 1024)).astype(np.float32) for i in range(2))
    components = mean_components(base, tuned, base_dtype=DType.F32, dtype=DType.F32, axis=None, components=2)
    gradient, delta = torch.ones(4096, 1024), torch.from_numpy(tuned - base)
    tracemalloc.start()  # numpy's memory; torch's is a chunk of rows too
    inner_products(gradient, lambda _, rows: delta[rows], components)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < base.nbytes / 4


@pytest.mark.parametrize(
    ("samples", "length", "pieces"), [(16, 256, 3), (4, 512, 8), (4, 2048, 12), (3, 100, 1), (50, 512, 1), (2, 40, 1)]
)
def test_few_samples_are_cut_into_many_pieces_of_some_length(samples: int, length: int, pieces: int) -> None:
    ids = np.arange(samples * length).reshape(samples, length)
    found = in_pieces(ids)
    assert found.shape == (samples * pieces, length // pieces)
    assert np.array_equal(found.reshape(samples, -1), ids[:, : found.size // samples])
