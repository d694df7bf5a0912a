"""SPEC 5 and 6 with Python's floats (binary64): slow, short, and wrong on demand.

The sum of two binary32 numbers rounded to binary64 and then to binary32 is the sum rounded once, because
53 >= 2 * 24 + 2; every term is exact in binary64.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

__all__ = ["Wrong", "decoded", "encoded", "fl32", "rebuilt", "unpacked"]

Wrong = Callable[[str], bool]
CODES = {"F16": "<e", "F32": "<f"}
SIZE = {"F16": 2, "BF16": 2, "F32": 4}
NAN = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000}
MAXIMUM = {"BF16": 0x7F7F, "F16": 0x7BFF, "F32": 0x7F7FFFFF}


def packed(value: float, code: str) -> bytes:
    """Round to nearest, ties to even; too large values become infinity."""
    try:
        return struct.pack(code, value)
    except OverflowError:
        return struct.pack(code, math.copysign(math.inf, value))


def fl32(value: float) -> float:
    return float(struct.unpack("<f", packed(value, "<f"))[0])


def decoded(raw: bytes, dtype: str) -> list[float]:
    """The values of raw little-endian numbers."""
    if dtype == "BF16":
        raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
    code = CODES.get(dtype, "<f")
    return [value for (value,) in struct.iter_unpack(code, raw)]


def bits(value: float, dtype: str) -> int:
    """One rounding, nearest-even, to dtype."""
    if math.isnan(value):
        return NAN[dtype]
    if dtype != "BF16":
        return int.from_bytes(packed(value, CODES[dtype]), "little")
    wide = int.from_bytes(packed(value, "<f"), "little")
    if math.isinf(value):
        return wide >> 16
    return (wide + 0x7FFF + (wide >> 16 & 1)) >> 16


def encoded(value: float, dtype: str, wrong: Wrong) -> bytes:
    """The bytes of `value` in dtype."""
    result, size = bits(value, dtype), SIZE[dtype]
    top = 1 << (8 * size - 1)
    sign, magnitude = result & top, result & (top - 1)
    back = decoded(result.to_bytes(size, "little"), dtype)[0]
    if not math.isnan(value) and not math.isinf(value):
        if wrong("truncating-cast") and magnitude and abs(back) > abs(value):
            magnitude -= 1
        if wrong("half-away-from-zero") and magnitude < MAXIMUM[dtype] and abs(back) < abs(value):
            above = decoded((magnitude + 1).to_bytes(size, "little"), dtype)[0]
            magnitude += above - abs(value) == abs(value) - abs(back)
        if wrong("saturates"):
            magnitude = min(magnitude, MAXIMUM[dtype])
        if wrong("flush-to-zero") and magnitude < (0x400 if dtype == "F16" else 0x80 if dtype == "BF16" else 0x800000):
            magnitude = 0
        if wrong("zero-has-no-sign") and magnitude == 0:
            sign = 0
    return (sign | magnitude).to_bytes(size, "little")


def unpacked(mask: bytes, rows: int, width: int, wrong: Wrong) -> bytes:
    """One byte, 0 or 1, for each weight, row-major."""
    stride = -(-width // 8)
    made = bytearray()
    for index in range(rows * width):
        i, j = divmod(index, width)
        place = i * stride * 8 + j
        if wrong("bits-across-rows"):
            place = index
        if wrong("transposed"):
            place = (index % rows) * stride * 8 + index // rows
        byte, bit = divmod(place, 8)
        bit = 7 - bit if wrong("most-significant-bit-first") else bit
        made.append(mask[byte] >> bit & 1 ^ wrong("inverted-signs"))
    return bytes(made)


class Part:
    """One component, ready for terms."""

    def __init__(self, axis: str, exponent: int, signs: bytes, scales: dict[str, bytes], wrong: Wrong) -> None:
        self.axis, self.signs, self.wrong = axis, signs, wrong
        self.exponent = 0 if wrong("exponent-ignored") else -exponent if wrong("exponent-negated") else exponent
        self.values = {word: self.scale(decoded(raw, "F16")) for word, raw in scales.items()}

    def scale(self, values: list[float]) -> list[float]:
        return [0.0 if value < 2**-14 and self.wrong("subnormal-scales-are-zero") else value for value in values]

    def term(self, index: int, height: int, width: int) -> float:
        """SPEC 5.3."""
        row, j = divmod(index, width)
        batch, wrong = row // height, self.wrong
        at = {"row": row, "col": j if wrong("batch-shares-col") else batch * width + j, "scalar": 0}
        if wrong("row-and-col-swapped"):
            at = {"row": batch * width + j, "col": row, "scalar": 0}
        value, shift = 1.0, math.ldexp(1.0, self.exponent)
        for word, held in self.values.items():
            value *= held[at[word] % len(held)] * (shift if wrong("exponent-on-each-scale") else 1.0)
        if wrong("product-in-f16") and self.axis == "row+col":
            value = decoded(packed(value, "<e"), "F16")[0]
        if wrong("product-in-bf16") and self.axis == "row+col":
            value = decoded(bits(value, "BF16").to_bytes(2, "little"), "BF16")[0]
        value *= 1.0 if wrong("exponent-on-each-scale") else shift
        if wrong("scale-in-f16"):
            value = decoded(packed(value, "<e"), "F16")[0]
        return value if self.signs[index] else -value


def rebuilt(base: list[float], parts: list[Part], shape: list[int], dtype: str, wrong: Wrong) -> bytes:
    """SPEC 6.1 and 6.2 over the covered shape."""
    *_, height, width = shape
    made = bytearray()
    ordered = parts[::-1] if wrong("components-reversed") else parts[:1] if wrong("first-component-only") else parts
    for index, start in enumerate(base):
        terms = [part.term(index, height, width) for part in ordered]
        a = decoded(encoded(start, dtype, lambda name: False), dtype)[0] if wrong("base-in-dtype-first") else start
        if wrong("terms-summed-first"):
            a = fl32(a + fl32(math.fsum(terms)))
            terms = []
        for term in terms:
            if term == 0 and wrong("zero-scale-skipped"):
                continue
            a = a + term if wrong("double-precision") else fl32(a + term)
            if wrong("flush-to-zero") and abs(a) < 2**-126:
                a = math.copysign(0.0, a)
            if wrong("rounds-after-each-component"):
                a = decoded(encoded(a, dtype, lambda name: False), dtype)[0]
        made += encoded(a, dtype, wrong)
    return bytes(made)
