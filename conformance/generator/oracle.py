"""SPEC 6 in integers: an oracle that shares no arithmetic with any loader.

    value(bits)  = (-1)^sign * mantissa * 2^exponent        exact, as three integers
    add(x, y)    = x + y                                    exact
    encode(x)    = the nearest number of a format, ties to even

A finite number is `Real("finite", sign, mantissa, exponent)`; zero keeps its sign. No float occurs here, so
neither the host's rounding mode nor its flush-to-zero flag can reach the expected bytes.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BINARY", "NAN", "BinaryFormat", "Real", "add", "decode", "encode", "multiply", "scale", "signed"]


class BinaryFormat(NamedTuple):
    """An IEEE 754 binary format: 1 sign bit, then `exponent_bits`, then `mantissa_bits`."""

    exponent_bits: int
    mantissa_bits: int

    @property
    def bytes(self) -> int:
        return (1 + self.exponent_bits + self.mantissa_bits) // 8

    @property
    def least(self) -> int:
        """The exponent of the smallest subnormal: -149 for binary32."""
        return 2 - (1 << (self.exponent_bits - 1)) - self.mantissa_bits


BINARY = {"F16": BinaryFormat(5, 10), "BF16": BinaryFormat(8, 7), "F32": BinaryFormat(8, 23)}


class Real(NamedTuple):
    """A number: kind is "finite", "infinite" or "nan"."""

    kind: str
    sign: int
    mantissa: int = 0
    exponent: int = 0


NAN = Real("nan", 0)


def decode(bits: int, dtype: str) -> Real:
    """The exact value of `bits` in `dtype`."""
    form = BINARY[dtype]
    mantissa = bits & ((1 << form.mantissa_bits) - 1)
    biased = (bits >> form.mantissa_bits) & ((1 << form.exponent_bits) - 1)
    sign = bits >> (form.mantissa_bits + form.exponent_bits)
    if biased == (1 << form.exponent_bits) - 1:
        return NAN if mantissa else Real("infinite", sign)
    if biased == 0:
        return Real("finite", sign, mantissa, form.least)
    return Real("finite", sign, mantissa | (1 << form.mantissa_bits), form.least + biased - 1)


def encode(x: Real, dtype: str) -> int:
    """The bits of the number of `dtype` nearest to `x`, ties to even (SPEC 6, 6.2 for NaN)."""
    form = BINARY[dtype]
    top = (1 << form.exponent_bits) - 1
    sign = x.sign << (form.exponent_bits + form.mantissa_bits)
    if x.kind == "nan":
        return (top << form.mantissa_bits) | (1 << (form.mantissa_bits - 1))
    if x.kind == "infinite":
        return sign | (top << form.mantissa_bits)
    unit = max(x.exponent + x.mantissa.bit_length() - form.mantissa_bits - 1, form.least)
    shift = unit - x.exponent
    if shift <= 0:
        kept = x.mantissa << -shift
    else:
        kept, rest = divmod(x.mantissa, 1 << shift)
        half = 1 << (shift - 1)
        kept += rest > half or (rest == half and kept & 1)
    if kept.bit_length() > form.mantissa_bits + 1:  # Rounded up to the next power of two.
        kept >>= 1
        unit += 1
    if kept < 1 << form.mantissa_bits:
        return sign | kept
    biased = unit - form.least + 1
    if biased >= top:
        return sign | (top << form.mantissa_bits)
    return sign | (biased << form.mantissa_bits) | (kept - (1 << form.mantissa_bits))


def add(x: Real, y: Real) -> Real:
    """x + y without rounding; zeros by IEEE 754: -0 + -0 = -0, otherwise an exact zero is +0."""
    if "nan" in (x.kind, y.kind):
        return NAN
    if x.kind == "infinite" or y.kind == "infinite":
        if x.kind == y.kind and x.sign != y.sign:
            return NAN
        return x if x.kind == "infinite" else y
    if not x.mantissa and not y.mantissa:
        return Real("finite", x.sign & y.sign)
    exponent = min(x.exponent, y.exponent)
    total = 0
    for term in (x, y):
        magnitude = term.mantissa << (term.exponent - exponent)
        total += -magnitude if term.sign else magnitude
    return Real("finite", int(total < 0), abs(total), exponent)


def multiply(x: Real, y: Real) -> Real:
    """x * y of two finite numbers, without rounding."""
    return Real("finite", x.sign ^ y.sign, x.mantissa * y.mantissa, x.exponent + y.exponent)


def scale(x: Real, exponent: int) -> Real:
    """x * 2^exponent of a finite number."""
    return x._replace(exponent=x.exponent + exponent)


def signed(x: Real, positive: int) -> Real:
    """x where `positive` is 1, -x where it is 0."""
    return x if positive else x._replace(sign=1 - x.sign)
