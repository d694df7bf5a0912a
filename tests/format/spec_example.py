"""The worked example of SPEC 13, made by the library. `python -m tests.format.spec_example` writes it into SPEC.md."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import peraxis_format as pxd

SPEC = Path(__file__).parents[2] / "SPEC.md"
BEGIN, END = "<!-- example:begin -->\n", "<!-- example:end -->"


def example_file() -> tuple[bytes, pxd.Array, pxd.Array]:
    """Return a file (a sign module [2, 10] on a base of ones, an exact vector), the base and the applied weight."""
    base = np.full((2, 10), 0x3F80, np.uint16)  # 1.0 in BF16
    signs = np.array([[1, 0, 1, 1, 0, 0, 0, 1, 1, 0], [0, 1, 0, 0, 1, 1, 1, 0, 0, 1]], np.bool_)
    row = np.array([0.25, 0.5], np.float16)
    module = pxd.ModuleDelta(
        name="proj.weight",
        shape=(2, 10),
        dtype=pxd.DType.BF16,
        encoding=pxd.Encoding.SIGN,
        base=pxd.BaseRef(dtype=pxd.DType.BF16, shape=(2, 10), sha256=hashlib.sha256(base.tobytes()).hexdigest()),
        components=(pxd.Component(axis=pxd.Axis.ROW, exponent=-2, mask=pxd.pack_signs(signs), row=row),),
    )
    norm = pxd.ModuleDelta(
        name="norm.weight",
        shape=(3,),
        dtype=pxd.DType.F32,
        encoding=pxd.Encoding.FULL,
        full=np.array([1.0, 2.0, 3.0], np.float32),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "example.pxd"
        with pxd.DeltaWriter(
            path,
            base=pxd.Identity(id="org/base"),
            fine_tuned=pxd.Identity(id="org/fine-tuned"),
            producer=pxd.Producer(name="example", version="1"),
        ) as writer:
            writer.add(module)
            writer.add(norm)
            writer.finish()
        return path.read_bytes(), base, pxd.reconstruct(module, base)


def hex_dump(data: bytes, begin: int) -> Iterator[str]:
    """Yield lines of 16 bytes: offset, hex, ASCII. Repeated lines of only spaces or zeros become one `*`."""
    previous = b""
    for offset in range(0, len(data), 16):
        line = data[offset : offset + 16]
        if line == previous:
            yield "*"
            continue
        previous = line
        shown = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in line)
        yield f"{begin + offset:08x}  {line.hex(' '):<47}  {shown}"


def render() -> str:
    """Return the text of the section."""
    data, base, applied = example_file()
    size = 8 + int.from_bytes(data[:8], "little")
    text = data[8:size].rstrip(b" ").decode()
    dump = "\n".join(re.sub(r"(\*\n)+", "*\n", "\n".join([*hex_dump(data, 0), f"{len(data):08x}\n"])).split("\n"))
    bits = [" ".join(f"{value:04x}" for value in row) for row in applied]
    digest = hashlib.sha256(_manifest(text).encode()).hexdigest()
    return f"""
One `sign` module of shape [2, 10] with `row` scales, and one exact vector. The base tensor `proj.weight` holds 1.0
(0x3F80) everywhere; SHA-256 of its 40 bytes is `{hashlib.sha256(base.tobytes()).hexdigest()}`.
`digests` holds that, then those of the two tensors of this file. The signs of row 0 are `+-++---++-`, of row 1
`-+--+++--+`; the scales 0.25 and 0.5 with exponent -2 stand for 0.0625 and 0.125.
The file has {len(data)} bytes; N is {size - 8} (0x{size - 8:x}). The JSON of the header, all of it:

```
{text}
```

The content ID is `sha256:{digest}`. The whole file:

```
{dump.strip()}
```

At 0x1000 stands the mask: `8d 01` is row 0 (bits 1,0,1,1,0,0,0,1 from the least significant, then 1,0), `72 02`
row 1. Zeros follow up to the next multiple of 64; there stand the two scales (0x3400, 0x3800) and zeros to the end of
the tensor; then the three F32. Applied, `proj.weight` holds, in hexadecimal BF16:

```
{bits[0]}
{bits[1]}
```

"""


def _manifest(header: str) -> str:
    import json

    manifest: str = json.loads(header)["__metadata__"]["manifest"]
    return manifest


def spec_with_example(spec: str) -> str:
    """Return SPEC.md with the section between the markers replaced."""
    head, rest = spec.split(BEGIN)
    return head + BEGIN + render() + END + rest.split(END)[1]


if __name__ == "__main__":
    SPEC.write_text(spec_with_example(SPEC.read_text("utf-8")), "utf-8")
