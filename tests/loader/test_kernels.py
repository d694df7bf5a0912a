"""Triton kernels give the bits of the reference in the interpreter or on a GPU, and compile to good code for sm_90."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import peraxis_format as pf
from peraxis_format.manifest import ComponentEntry
from peraxis_format.ops.tensors import TORCH_DTYPES, storage_array
from tests.loader.test_fast import module_of, random_component, random_weights

kernels = pytest.importorskip("peraxis_format.ops.rebuild.triton", reason="triton is not installed")


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(1, 1), (5, 7), (16, 64), (3, 1032), (17, 1033), (9, 2056), (2, 9, 24), (2, 3, 3, 13)]


def packed_module(module: pf.ModuleDelta) -> tuple[dict[str, int], Tensor]:
    """Return the offsets of a module's tensors in a buffer, and the buffer, as in a transfer."""
    data = bytearray(pf.ALIGNMENT)  # the first module of a transfer does not begin at byte 0
    offsets = {}
    for suffix, array in module.tensors():
        data += bytes(-len(data) % pf.ALIGNMENT)
        offsets[suffix] = len(data)
        data += array.tobytes()
    return offsets, torch.frombuffer(data, dtype=torch.uint8).to(DEVICE)


def as_tensor(array: pf.Array, dtype: pf.DType) -> Tensor:
    signed = {2: np.int16, 4: np.int32}[dtype.itemsize]
    return torch.from_numpy(array.view(signed).copy()).view(TORCH_DTYPES[dtype]).to(DEVICE)


def applied(modules: Sequence[pf.ModuleDelta], bases: Sequence[pf.Array], *, in_place: bool = False) -> list[bytes]:
    """Apply every module with the apply kernel."""
    out = []
    for module, base in zip(modules, bases, strict=True):
        offsets, buffer = packed_module(module)
        source = as_tensor(base, module.dtype)
        live = source if in_place else torch.empty_like(source)
        if not in_place:
            live.view(torch.uint8).fill_(0xA5)
        entries = tuple(ComponentEntry(axis=c.axis, exponent=c.exponent) for c in module.components)
        stored = kernels.StoredModule(components=entries, offsets=offsets, base=source, out=live, dtype=module.dtype)
        with np.errstate(all="ignore"):
            for launch in kernels.launches([stored], DEVICE):
                launch.run(buffer)
        out.append(storage_array(live.cpu()).tobytes())
    return out


@pytest.mark.parametrize("dtype", [pf.DType.BF16, pf.DType.F16, pf.DType.F32])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_apply_kernel_has_the_bits_of_the_reference(dtype: pf.DType, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(hash(shape) % 1000)
    for axes in ([pf.Axis.ROW], [pf.Axis.COL], [pf.Axis.TENSOR], [pf.Axis.ROW_COL, pf.Axis.COL, pf.Axis.ROW]):
        base = random_weights(rng, dtype, shape)
        module = module_of(tuple(random_component(rng, axis, shape) for axis in axes), shape, dtype, dtype)
        expected = [pf.reconstruct(module, base, backend="numpy").tobytes()]
        assert applied([module], [base]) == applied([module], [base], in_place=True) == expected


def test_every_bf16_weight_is_rounded_as_the_reference_rounds_it() -> None:
    shape = (64, 1024)
    base = np.arange(1 << 16, dtype=np.uint16).reshape(shape)
    rng = np.random.default_rng(0)
    for _ in range(3):
        module = module_of((random_component(rng, pf.Axis.ROW_COL, shape),), shape, pf.DType.BF16, pf.DType.BF16)
        assert applied([module], [base]) == [pf.reconstruct(module, base, backend="numpy").tobytes()]


@pytest.mark.slow
def test_kernels_compile_for_sm_90_with_wide_accesses_and_plain_arithmetic() -> None:
    """This needs no GPU, because Triton includes an assembler. It runs in its own process, outside the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.loader.compile_sm90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # Instructions limit decode: 1.7 per weight, and a thread has 128 weights in its loop. Masks are loaded ahead.
    assert 128 < found["decode 0 16 True"]["loop"] <= 1.8 * 128
    assert found["decode 0 16 True"]["ahead"] > 0
    assert len(found) == 6 + 3 + 8 + 3 + 3 + 6 + 6
    for name, counts in found.items():
        kernel, kind, *rest = name.split()
        # F32 weights on 128 rows at a time need more registers than there are.
        assert counts["local"] == 0 or (kernel, kind) == ("prefill", "2"), (name, "spills")
        if kernel == "apply":
            # SPEC 6: subnormals are kept, and no product is fused into a sum.
            assert counts["flush"] == counts["fused"] == 0, name
        if kernel in ("single", "merge") or rest == ["True"]:
            assert counts["wide_loads"] >= 2, name
        if kernel == "merge" or (kernel == "apply" and rest == ["True"]):
            assert counts["wide_stores"] >= 2, name
        if kernel in ("decode", "prefill") and kind != "2":
            assert counts["tensor_cores"] > 0, name
