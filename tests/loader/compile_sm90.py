"""Compile every kernel for sm_90 without a GPU and print properties of its code as JSON. test_kernels.py runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peraxis_format.ops.exact.kinds import BLOCK, KINDS
from peraxis_format.ops.exact.triton import TILE, count_kernel, exact_kernel
from peraxis_format.ops.rebuild import triton as kernels
from peraxis_format.ops.signed_matmul import triton as serving

IO = {
    "tiles": "*i32", "records": "*i64", "terms": "*i64", "buffer": "*u8", "stride": "i32", "order": "*i32",
    "old": "*i16", "new": "*i16", "index": "*i64", "ends": "*i64", "data": "*i32", "sound": "*i32", "weights": "i64",
    "counts": "*i32", "partial": "*fp32", "rows": "i32", "N": "i32", "signs": "i32", "ones": "i32", "variant": "i32",
    "count": "i32",
}  # fmt: skip


def compiled(kernel: Any, bits: str, constants: Mapping[str, Any], **options: int) -> Mapping[str, Any]:
    """Return PTX and machine code as for a launch with torch's tensors: addresses and widths are multiples of 16."""
    signature = {**IO, **dict.fromkeys(("y", "x", "weight", "bias", "out"), bits)}
    if bits == "*i32":
        signature |= {"old": bits, "new": bits}
    names = kernel.arg_names
    round_ones = (i for i, n in enumerate(names) if n in signature and (signature[n][0] == "*" or n in ("N", "stride")))
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in round_ones},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm


def everything() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every kernel, compiled as serve/launch.py and engine.py launch it."""
    for kind, bits in ((kernels.BF16, "*u16"), (kernels.F16, "*u16"), (kernels.F32, "*u32")):
        exact = kind == kernels.F32
        for aligned in (True, False):
            tile = {"KIND": kind, "ALIGNED": aligned, "ROWS_": kernels.ROWS, "COLUMNS_": kernels.COLUMNS}
            yield f"apply {kind} {aligned}", compiled(kernels.apply_kernel, bits, tile, num_warps=8)
        common = {"K": 4096, "TERMS": 2, "KIND": kind}
        tile = {**common, "HAS_BIAS": True, "BN": 8, "BG": 128}
        yield f"single {kind}", compiled(serving.single_kernel, bits, tile)
        for height, split in ((16, 1), (64, 8)):
            tile = {**common, "BM": height, "BN": 64 if exact else 128, "BG": 8 if exact else 32, "SPLIT": split}
            for plain in (True, False) if kind == kernels.BF16 else (False,):
                constants = {**tile, "PLAIN": plain, "UPCAST": False, "ALIGNED": not exact}
                warps = 4 if exact else 8
                yield (
                    f"decode {kind} {height} {plain}",
                    compiled(serving.decode_kernel, bits, constants, num_warps=warps, num_stages=3),
                )
        yield f"reduce {kind}", compiled(serving.reduce_kernel, bits, {"KIND": kind, "SPLIT": 8, "BN": 256})
        tile = {**common, "BN": 8, "BG": 64}
        yield f"merge {kind}", compiled(serving.merge_kernel, bits, tile, num_warps=4)
        for height in (64, 128):
            tile = {**common, "HAS_BIAS": True, "BM": height, "BN": 128, "BG": 8, "UPCAST": exact}
            yield f"prefill {kind} {height}", compiled(serving.prefill_kernel, bits, tile, num_warps=8, num_stages=3)


def exact_updates() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the decoder of exact updates, compiled as ops/exact/torch.py launches it."""
    for dtype, kind in KINDS.items():
        constants = {"MANTISSA": kind.mantissa, "MASK": kind.mask, "WIDTH": kind.width, "SIZE": BLOCK, "N": TILE}
        yield f"exact {dtype.value}", compiled(exact_kernel, f"*i{kind.width}", constants, num_warps=1)
        yield f"count {dtype.value}", compiled(count_kernel, f"*i{kind.width}", constants, num_warps=4)


def longest_loop(cubin: bytes) -> int:
    """Return the machine instructions of the longest loop."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile() as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    lines = text.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.L_x_\d+):", line.strip()))}
    jumps = [(labels[m[1]], i) for i, line in enumerate(lines) if (m := re.search(r"BRA.*`\((\.L_x_\d+)\)", line))]
    return max((sum(";" in line for line in lines[a:i]) for a, i in jumps if a < i), default=0)


def described(asm: Mapping[str, Any]) -> dict[str, int]:
    """Return counts of the relevant instructions and resources of the code."""
    patterns = {
        "wide_loads": r"ld\.global\.v4", "wide_stores": r"st\.global\.v4", "flush": r"\.ftz", "fused": r"fma\.",
        "tensor_cores": r"mma", "ahead": r"cp\.async\.c[ag]", "local": r"(?:ld|st)\.local",
    }  # fmt: skip
    counts = {name: len(re.findall(pattern, asm["ptx"])) for name, pattern in patterns.items()}
    return {**counts, "loop": longest_loop(asm["cubin"])}


if __name__ == "__main__":
    sys.stdout.write(json.dumps({name: described(asm) for name, asm in (*everything(), *exact_updates())}) + "\n")
