"""A second decoder of exact updates, written in C only from SPEC 5.6 to 5.9, agrees with the library."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peraxis_format.dtypes import Array, DType
from peraxis_format.errors import BindingError, PayloadError
from peraxis_format.ops.exact import apply, check, encode
from peraxis_format.ops.exact.kinds import KINDS
from peraxis_format.testing import float_dtypes, pairs

SOURCE = Path(__file__).with_name("exact_decode.c")
Decoder = Callable[[Array, Array, Array, DType], bytes | None]


class Kind(ctypes.Structure):
    _fields_ = (("width", ctypes.c_int), ("mantissa", ctypes.c_int), ("mask", ctypes.c_int))


@pytest.fixture(scope="module")
def decode(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("c") / "exact.so"
    flags = ["-O2", "-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", str(library), str(SOURCE)], check=True)
    function = ctypes.CDLL(str(library)).exact_apply
    pointer = ctypes.c_void_p
    function.argtypes = (pointer, ctypes.c_int64, pointer, pointer, Kind)

    def decoded(old: Array, index: Array, data: Array, dtype: DType) -> bytes | None:
        weights, entries = old.copy(), np.ascontiguousarray(index)
        stored = np.concatenate([data, np.zeros(1, np.uint8)])  # at least one byte
        kind = Kind(KINDS[dtype].width, KINDS[dtype].mantissa, KINDS[dtype].mask)
        addresses = weights.ctypes.data, old.size, entries.ctypes.data, stored.ctypes.data
        return weights.tobytes() if function(*addresses, kind) == 0 else None

    return decoded


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_what_the_library_writes_the_other_decoder_reads(decode: Decoder, data: st.DataObject) -> None:
    dtype = data.draw(float_dtypes())
    old, new = data.draw(pairs(dtype, (data.draw(st.integers(1, 300)),)))
    index, blocks = encode(old, new, dtype, prefer=data.draw(st.sampled_from(("size", "speed"))))
    assert decode(old, index, blocks, dtype) == new.tobytes()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_both_decode_damaged_blocks_alike(decode: Decoder, data: st.DataObject) -> None:
    dtype = data.draw(float_dtypes())
    old, new = data.draw(pairs(dtype, (data.draw(st.integers(2, 300)),)))
    index, blocks = encode(old, new, dtype, prefer=data.draw(st.sampled_from(("size", "speed"))))
    if not blocks.size:
        return
    damaged = blocks.copy()
    bit = data.draw(st.integers(0, 8 * blocks.size - 1))
    damaged[bit // 8] ^= 1 << (bit % 8)
    try:
        check(index, damaged, old.size, dtype, field="w")
        weights = old.copy()
        apply(weights, index, damaged, dtype)
    except PayloadError:
        return
    except BindingError:
        assert decode(old, index, damaged, dtype) is None
    else:
        assert decode(old, index, damaged, dtype) == weights.tobytes()


def test_blocks_of_all_kinds_and_a_short_last_one(decode: Decoder) -> None:
    random = np.random.default_rng(0)
    old = (random.standard_normal(140_000) * 0.02).astype(np.float16)
    new = old.copy()
    words = new.view(np.uint16)
    words[70_000:][random.random(70_000) < 0.03] += 1
    words[131_072:] ^= random.integers(0, 65536, 140_000 - 131_072).astype(np.uint16)
    index, data = encode(old, new, DType.F16)
    # Unchanged; gaps, which are shorter than keyed if changes do not depend on the exponent; new patterns.
    assert (index & 255).tolist() == [0, 0, 255]
    assert int(index[0]) >> 8 == 0 < int(index[1]) >> 8
    assert decode(old, index, data, DType.F16) == new.tobytes()
