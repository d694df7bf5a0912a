"""SPEC 6 over the exact arithmetic of oracle.py: base and fine-tuned checkpoint of a content."""

from __future__ import annotations

import math
from typing import Any

from .build import safetensors
from .content import Content, Module, words
from .oracle import NAN, Real, add, decode, encode, multiply, scale, signed

__all__ = ["apply"]


def integers(data: bytes, size: int) -> list[int]:
    return [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]


def term(part: Any, index: int, shape: tuple[int, ...]) -> Real:
    """SPEC 5.3: the term of the weight with this flat index."""
    width, height = shape[-1], shape[-2]
    row, j = divmod(index, width)
    if part.axis == "tensor":
        value = decode(part.scalar[0], "F16")
    else:
        r = decode(part.row[row], "F16") if part.row else None
        c = decode(part.col[row // height * width + j], "F16") if part.col else None
        value = multiply(r, c) if r and c else r or c or NAN
    return signed(scale(value, part.exponent), part.signs[index])


def rebuilt(module: Module) -> bytes:
    """SPEC 6: the fine-tuned tensor."""
    if module.encoding == "full":
        return module.exact
    if module.encoding == "exact":
        return module.new + module.exact
    base, shape = module.base, module.covered
    if base is None:
        raise ValueError(f"{module.name}: {module.encoding} needs a base")
    size = {"F16": 2, "BF16": 2, "F32": 4}
    count = math.prod(shape)
    if module.encoding == "same" and base.dtype == module.dtype:
        whole = math.prod(base.shape)
        return base.data[: len(base.data) * count // whole] + module.exact
    held = integers(base.data, size[base.dtype])[:count]
    made = []
    for index, bits in enumerate(held):
        a = decode(encode(decode(bits, base.dtype), "F32"), "F32")
        for part in module.components:
            a = decode(encode(add(a, term(part, index, shape)), "F32"), "F32")
        made.append(encode(a, module.dtype))
    return words(made, size[module.dtype]) + module.exact


def apply(content: Content) -> tuple[bytes, bytes]:
    """The base and the fine-tuned checkpoint, as safetensors files."""
    base = {m.name: (m.base.dtype, m.base.shape, m.base.data) for m in content.modules if m.base}
    made = {m.name: (m.dtype, m.shape, rebuilt(m)) for m in content.modules}
    made |= {alias: made[name] for name, alias in content.tied}
    for name in content.dropped:
        base[name] = ("U8", (3,), b"old")
    return safetensors(base, metadata="pt"), safetensors(made, metadata="pt")
