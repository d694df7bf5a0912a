"""The GPU decoder of exact updates, in Triton's interpreter, is exact and refuses malformed blocks."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from peraxis_format.dtypes import Array, DType, from_float32
from peraxis_format.errors import BindingError
from peraxis_format.ops.exact import BLOCK, Prefer, encode
from peraxis_format.ops.exact.torch import moved
from peraxis_format.ops.tensors import TORCH_DTYPES, storage_array

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS: tuple[Literal["cpu", "triton"], ...] = ("cpu", "triton")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")


def pair(dtype: DType, seed: int, size: int = 150) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    old = from_float32((random.standard_normal(size) * 0.02).astype(np.float32), dtype)
    new = old.copy()
    words = new.view(f"u{dtype.itemsize}")
    words[random.random(size) < 0.2] += 1
    words[random.random(size) < 0.05] -= 1
    words[random.integers(0, size, 3)] ^= 0x155
    return old, new


def tensor(array: Array, dtype: DType) -> torch.Tensor:
    return torch.from_numpy(array.copy().view(np.uint8)).view(TORCH_DTYPES[dtype]).to(DEVICE)


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32])
@pytest.mark.parametrize("prefer", ["size", "speed"])
def test_the_kernel_gives_the_bits_of_the_reference(dtype: DType, prefer: Prefer) -> None:
    old, new = pair(dtype, 1)
    index, data = encode(old, new, dtype, prefer=prefer)
    assert (int(index[0]) & 255 > 0) == (prefer == "size")
    live = tensor(old, dtype)
    found = moved(live, index, data, dtype, backend="triton")
    assert storage_array(found.cpu()).tobytes() == new.tobytes()
    assert storage_array(live.cpu()).tobytes() == old.tobytes()


def test_blocks_that_stay_and_blocks_of_new_patterns_stand_beside_others() -> None:
    old, new = pair(DType.BF16, 2, 2 * BLOCK + 100)
    new[:BLOCK] = old[:BLOCK]
    new[BLOCK : 2 * BLOCK] = np.random.default_rng(3).integers(0, 65536, BLOCK)
    index, data = encode(old, new, DType.BF16)
    assert (index[:2] & 255).tolist() == [0, 255]
    found = moved(tensor(old, DType.BF16), index, data, DType.BF16, backend="triton")
    assert storage_array(found.cpu()).tobytes() == new.tobytes()


@pytest.mark.parametrize("prefer", ["size", "speed"])
def test_a_block_on_other_weights_or_with_other_bits_is_refused_or_gives_other_weights(prefer: Prefer) -> None:
    old, new = pair(DType.BF16, 4, 60)
    index, data = encode(old, new, DType.BF16, prefer=prefer)
    for bit in range(0, 8 * data.size, 37):
        wrong = data.copy()
        wrong[bit // 8] ^= 1 << (bit % 8)
        for backend in BACKENDS:
            try:
                found = moved(tensor(old, DType.BF16), index, wrong, DType.BF16, backend=backend)
            except BindingError:
                continue
            assert storage_array(found.cpu()).tobytes() != new.tobytes()
