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
from peraxis_format.torch.terms import rebuild, terms_of
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


def applied(modules: Sequence[pf.ModuleDelta], bases: Sequence[pf.Array], *, in_place: bool = False) -> list[bytes]:
    """Every module through the apply kernel."""
    out = []
    for module, base in zip(modules, bases, strict=True):
        packed, buffer = packed_module(module)
        source = as_tensor(base, module.dtype)
        live = source if in_place else torch.empty_like(source)
        if not in_place:
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
        expected = [pf.reconstruct(module, base, compiled=False).tobytes()]
        assert applied([module], [base]) == applied([module], [base], in_place=True) == expected


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


_COMPILE = """
import json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from peraxis_format.torch import kernels as k, serving as s

def compiled(kernel, signature, constants, **options):
    names = kernel.arg_names
    # As a launch with torch's tensors would: addresses and widths are multiples of 16.
    round = [i for i, n in enumerate(names) if n not in constants and (signature[n][0] == "*" or n in ("N", "stride"))]
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else signature[n] for n in names},
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in round},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

io = dict(
    tiles="*i32", records="*i64", terms="*i64", buffer="*u8", stride="i32", order="*i32", partial="*fp32", rows="i32",
    N="i32", signs="i32", ones="i32", variant="i32",
)
out = {}
for kind, bits in ((k.BF16, "*u16"), (k.F16, "*u16"), (k.F32, "*u32")):
    for aligned in (True, False):
        out[f"apply {kind} {aligned}"] = compiled(
            k.apply_kernel, io, dict(KIND=kind, ALIGNED=aligned, ROWS_=k.ROWS, COLUMNS_=k.COLUMNS), num_warps=8
        )
    signature = {**io, "y": bits, "x": bits, "weight": bits, "bias": bits}
    common, exact = dict(K=4096, TERMS=2, KIND=kind), kind == k.F32
    out[f"single {kind}"] = compiled(s.single_kernel, signature, dict(**common, HAS_BIAS=True, BN=8, BG=128))
    for height, split in ((16, 1), (64, 8)):
        tile = dict(BM=height, BN=64 if exact else 128, BG=8 if exact else 16, SPLIT=split, UPCAST=False)
        for plain in (True, False) if kind == k.BF16 else (False,):
            out[f"decode {kind} {height} {plain}"] = compiled(
                s.decode_kernel, signature, dict(**common, **tile, PLAIN=plain), num_warps=4, num_stages=3
            )
    out[f"reduce {kind}"] = compiled(s.reduce_kernel, signature, dict(KIND=kind, SPLIT=8, BN=256))
    for height in (64, 128):
        out[f"prefill {kind} {height}"] = compiled(
            s.prefill_kernel, signature, dict(**common, HAS_BIAS=True, BM=height, BN=128, BG=8, UPCAST=exact),
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
    assert len(found) == 6 + 3 + 8 + 3 + 6
    for name, counts in found.items():
        kernel, kind, *rest = name.split()
        # Binary32 weights on 128 rows at a time want more registers than there are.
        assert counts["local"] == 0 or (kernel, kind) == ("prefill", "2"), (name, "spills")
        if kernel == "apply":
            # SPEC 6: subnormals are kept; no product is fused into a sum.
            assert counts["flush"] == counts["fused"] == 0, name
        if kernel == "single" or rest == ["True"]:
            assert counts["wide_loads"] >= 4, name
        if kernel == "apply" and rest == ["True"]:
            assert counts["wide_stores"] >= 4, name
        if kernel in ("decode", "prefill") and kind != "2":
            assert counts["tensor_cores"] > 0, name
