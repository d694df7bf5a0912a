"""Triton kernels: the reference's bits in the interpreter (or on a GPU), and code for sm_90 that is what was meant."""

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
from peraxis_format.manifest import ComponentEntry, ModuleEntry
from peraxis_format.torch import engine
from peraxis_format.torch.image import Field, Packed
from peraxis_format.torch.storage import TORCH_DTYPES, storage_array
from peraxis_format.torch.terms import project, rebuild, terms_of
from tests.loader.test_fast import module_of, random_component, random_weights

kernels = pytest.importorskip("peraxis_format.torch.kernels", reason="triton is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(1, 1), (5, 7), (16, 64), (3, 1032), (17, 1033), (9, 2056), (2, 9, 24), (2, 3, 3, 13)]


def packed_module(module: pf.ModuleDelta) -> tuple[Packed, Tensor]:
    """A module in a buffer, as a transfer holds it."""
    data = bytearray(64)  # the first module of a transfer does not begin at its first byte
    fields = []
    for suffix, array in module.tensors():
        data += bytes(-len(data) % 64)
        kind = pf.DType.U8 if array.dtype == np.uint8 else pf.DType.F16
        fields.append(Field(suffix, kind, array.shape, len(data)))
        data += array.tobytes()
    entry = ModuleEntry(
        name=module.name, shape=module.shape, dtype=module.dtype, encoding=module.encoding, sha256=None,
        components=tuple(ComponentEntry(axis=c.axis, exponent=c.exponent) for c in module.components),
        base=module.base,
    )  # fmt: skip
    box = tuple((0, d) for d in module.shape)
    return Packed(entry, box, 64, len(data), tuple(fields), ()), torch.frombuffer(data, dtype=torch.uint8).to(DEVICE)


def as_tensor(array: pf.Array, dtype: pf.DType) -> Tensor:
    signed = {2: np.int16, 4: np.int32}[dtype.itemsize]
    return torch.from_numpy(array.view(signed).copy()).view(TORCH_DTYPES[dtype]).to(DEVICE)


def applied(modules: Sequence[pf.ModuleDelta], bases: Sequence[pf.Array]) -> list[bytes]:
    """Every module through the apply kernel."""
    out = []
    for module, base in zip(modules, bases, strict=True):
        packed, buffer = packed_module(module)
        live, source = as_tensor(base, module.dtype), as_tensor(base, module.dtype)
        live.view(torch.uint8).fill_(0xA5)
        with np.errstate(all="ignore"):
            for kind, aligned, tiles, records, terms in engine._tables([(packed, source, live)], DEVICE):
                kernels.apply_kernel[(tiles.numel(),)](
                    tiles, records, terms, buffer, KIND=kind, ALIGNED=aligned, ROWS_=kernels.ROWS,
                    COLUMNS_=kernels.COLUMNS,
                )  # fmt: skip
        out.append(storage_array(live.cpu()).tobytes())
    return out


@pytest.mark.parametrize("dtype", [pf.DType.BF16, pf.DType.F16, pf.DType.F32])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_apply_kernel_has_the_bits_of_the_reference(dtype: pf.DType, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(hash(shape) % 1000)
    for axes in ([pf.Axis.ROW], [pf.Axis.COL], [pf.Axis.TENSOR], [pf.Axis.ROW_COL, pf.Axis.COL, pf.Axis.ROW]):
        base = random_weights(rng, dtype, shape)
        module = module_of(tuple(random_component(rng, axis, shape) for axis in axes), shape, dtype, dtype)
        assert applied([module], [base]) == [pf.reconstruct(module, base, compiled=False).tobytes()]


def test_every_bf16_weight_is_rounded_as_the_reference_rounds_it() -> None:
    shape = (64, 1024)
    base = np.arange(1 << 16, dtype=np.uint16).reshape(shape)
    rng = np.random.default_rng(0)
    for _ in range(3):
        module = module_of((random_component(rng, pf.Axis.ROW_COL, shape),), shape, pf.DType.BF16, pf.DType.BF16)
        assert applied([module], [base]) == [pf.reconstruct(module, base, compiled=False).tobytes()]


@pytest.mark.parametrize("compiled", [False, True])
def test_plain_torch_rebuilds_the_reference_bits_too(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """terms.py is what serving kernels are held to; it is itself held to the format's reference."""
    if compiled:
        pytest.importorskip("numba")
        monkeypatch.setattr("peraxis_format.torch.terms._COMPILED_FROM", 0)
    rng = np.random.default_rng(2)
    for shape in ((5, 7), (33, 130)):
        base = (rng.normal(size=shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        components = tuple(random_component(rng, axis, shape) for axis in pf.Axis)
        module = module_of(components, shape, pf.DType.BF16, pf.DType.BF16)
        terms = terms_of(module, torch.device("cpu"))[0]
        weight = torch.from_numpy(base.view(np.int16).copy()).view(torch.bfloat16)
        expected = pf.reconstruct(module, base, compiled=False).tobytes()
        assert storage_array(rebuild(weight, terms)).tobytes() == expected


def serving_tables(variants: Sequence[Sequence[object]]) -> tuple[Tensor, Tensor, int]:
    heads, rows = [0], []
    for terms in variants:
        rows += [[t.mask.data_ptr(), t.row.data_ptr(), t.col.data_ptr()] for t in terms]  # type: ignore[attr-defined]
        heads.append(len(rows))
    most = max(len(terms) for terms in variants)
    return torch.tensor(heads, dtype=torch.int32).to(DEVICE), torch.tensor(rows).to(DEVICE), most


def tiles_of(ids: Sequence[int], height: int) -> tuple[Tensor, Tensor]:
    order = sorted(range(len(ids)), key=lambda i: (ids[i], i))
    tiles = []
    for variant in sorted(set(ids)):
        members = [p for p, i in enumerate(order) if ids[i] == variant]
        tiles += [(variant, a, min(height, members[-1] + 1 - a)) for a in range(members[0], members[-1] + 1, height)]
    return torch.tensor(order, dtype=torch.int32).to(DEVICE), torch.tensor(tiles, dtype=torch.int32).to(DEVICE)


@pytest.mark.parametrize("rows", [1, 5, 33, 64])
@pytest.mark.parametrize(("d_out", "d_in"), [(8, 8), (70, 75), (65, 200)])
def test_serving_kernels_agree_with_plain_torch(rows: int, d_out: int, d_in: int) -> None:
    rng = np.random.default_rng(rows)
    torch.manual_seed(rows)
    weight = torch.randn(d_out, d_in).to(DEVICE)
    variants = []
    for count in (1, 3, 2):
        components = tuple(_mild(rng, (d_out, d_in), axis) for axis in list(pf.Axis)[:count])
        module = module_of(components, (d_out, d_in), pf.DType.F32, pf.DType.F32)
        variants.append(terms_of(module, DEVICE)[0])
    heads, table, most = serving_tables(variants)
    ids = [int(v) for v in rng.integers(-1, 3, rows)]
    x = torch.randn(rows, d_in).to(DEVICE)
    expected = torch.empty(rows, d_out).to(DEVICE)
    for i, v in enumerate(ids):
        expected[i] = x[i] @ (weight if v < 0 else rebuild(weight, variants[v])).t()
    order, tiles = tiles_of(ids, 16)
    prefilled = torch.empty_like(expected)
    bits = [t.view(torch.uint32) for t in (prefilled, x, weight)]
    kernels.prefill_kernel[(-(-d_out // 32), len(tiles))](
        bits[0], d_out, bits[1], bits[2], bits[1], order, tiles, heads, table, d_out, K=d_in, TERMS=most,
        KIND=kernels.F32, HAS_BIAS=False, BM=16, BN=32, BK=32, UPCAST=True,
    )  # fmt: skip
    torch.testing.assert_close(prefilled, expected, rtol=1e-4, atol=1e-4)
    changed = [v for v in ids if v >= 0]
    if changed:
        decoded = x @ weight.t()
        keep = tiles[tiles[:, 0] >= 0].contiguous()
        kernels.decode_kernel[(-(-d_out // 32), len(keep))](
            decoded.view(torch.uint32), d_out, bits[1], order, keep, heads, table, d_out, K=d_in, TERMS=most,
            KIND=kernels.F32, BM=16, BN=32, BK=64, PRECISION="ieee",
        )  # fmt: skip
        torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-4)
        for i, v in enumerate(ids):
            if v >= 0:
                one = x[i : i + 1] @ weight.t() + project(x[i : i + 1], variants[v])
                torch.testing.assert_close(decoded[i : i + 1], one, rtol=1e-4, atol=1e-4)


def _mild(rng: np.random.Generator, shape: tuple[int, ...], axis: pf.Axis) -> pf.Component:
    from tests.loader.support import random_component as sized

    return sized(rng, axis, shape, 0.1)


_COMPILE = """
import json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from peraxis_format.torch import kernels as k

def compiled(kernel, signature, constants, **options):
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else signature[n] for n in names},
        constexprs={(names.index(n),): v for n, v in constants.items()},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

apply = dict(tiles="*i32", records="*i64", terms="*i64", buffer="*u8")
serve = dict(stride="i32", order="*i32", tiles="*i32", heads="*i32", terms="*i64", N="i32")
out = {}
for kind, bits in ((k.BF16, "*u16"), (k.F16, "*u16"), (k.F32, "*u32")):
    for aligned in (True, False):
        out[f"apply {kind} {aligned}"] = compiled(
            k.apply_kernel, apply, dict(KIND=kind, ALIGNED=aligned, ROWS_=k.ROWS, COLUMNS_=k.COLUMNS), num_warps=8
        )
    io = {**serve, "y": bits, "x": bits, "weight": bits, "bias": bits}
    common = dict(K=4096, TERMS=2, KIND=kind)
    precision = "ieee" if kind == k.F32 else "tf32"
    out[f"decode {kind}"] = compiled(
        k.decode_kernel, io, dict(**common, BM=16, BN=64, BK=64, PRECISION=precision), num_warps=4, num_stages=3
    )
    out[f"prefill {kind}"] = compiled(
        k.prefill_kernel, io, dict(**common, HAS_BIAS=True, BM=64, BN=128, BK=64, UPCAST=kind == k.F32),
        num_warps=8, num_stages=3,
    )
count = lambda ptx, what: len(re.findall(what, ptx))
print(json.dumps({name: {
    "wide_loads": count(ptx, r"ld\\.global\\.v4"), "wide_stores": count(ptx, r"st\\.global\\.v4"),
    "flush": count(ptx, r"\\.ftz"), "fused": count(ptx, r"fma\\."), "tensor_cores": count(ptx, r"mma"),
    "local": count(ptx, r"(?:ld|st)\\.local"),
} for name, ptx in out.items()}))
"""


@pytest.mark.slow
def test_kernels_compile_for_sm_90_with_wide_accesses_and_plain_arithmetic() -> None:
    """Needs no GPU: Triton brings its assembler along. In a process of its own, outside the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 12
    for name, counts in found.items():
        assert counts["local"] == 0, (name, "spills")
        if name.startswith("apply"):
            # SPEC 6: subnormals are kept; no product is fused into a sum.
            assert counts["flush"] == counts["fused"] == 0, name
        if name.endswith("True"):
            assert counts["wide_loads"] >= 4, name
            assert counts["wide_stores"] >= 4, name
        if name in ("decode 0", "decode 1", "prefill 0", "prefill 1"):
            assert counts["tensor_cores"] > 0, name
