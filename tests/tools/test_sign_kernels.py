"""The Triton kernels of sign search compile without a GPU. test_compress_fit checks their results."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

_COMPILE = """
import json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from peraxis_tools.ops.sign_search import triton as s

def compiled(kernel, arrays, **constants):
    signature = {**arrays, "d_out": "i32", **{name: "constexpr" for name in constants}}
    names = kernel.arg_names
    pointers = [i for i, name in enumerate(names) if name in arrays]
    source = ASTSource(
        kernel,
        signature={name: signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

floats = lambda *names: {name: "*fp32" for name in names}
out = {}
for masks in (1, 4):
    for width in (s.COLUMNS, 92):
        tile = dict(WIDTH=width, MASKS=masks, ROWS_=s.ROWS, COLUMNS_=s.COLUMNS)
        out[f"gptq_signs {masks} {width}"] = compiled(
            s.gptq_signs_kernel, {**floats("work", "block", "rows", "cols", "errors"), "signs": "*u8"}, **tile
        )
        out[f"coordinate_descent {masks} {width}"] = compiled(
            s.coordinate_descent_kernel, floats("gradient", "block", "values", "change"), **tile
        )
print(json.dumps({name: len(re.findall(r"(?:ld|st)\\.local", ptx)) for name, ptx in out.items()}))
"""


@pytest.mark.slow
def test_sign_kernels_compile_for_sm_90_and_stay_in_registers() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    spilled = json.loads(done.stdout.splitlines()[-1])
    assert len(spilled) == 8
    assert not any(spilled.values()), spilled
