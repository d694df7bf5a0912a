"""Apply cases of one weight each or few: half-way roundings, overflow, subnormals, NaN (SPEC 6)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .build import build
from .content import Component, Content, component, full, same, sign, words
from .entry import Entry
from .rebuild import apply

__all__ = ["accepted", "roundings", "scalars", "steps"]

ONE = {"BF16": 0x3F80, "F16": 0x3C00, "F32": 0x3F800000}
SIZE = {"BF16": 2, "F16": 2, "F32": 4}
BASE16 = 0x3C00  # F16 1.0


def accepted(slug: str, clause: str, content: Content, **hooks: Any) -> Entry:
    base, output = apply(content)
    return Entry(
        id=slug,
        clause=clause,
        operation="apply",
        files={"file": build(content, **hooks), "base": base, "output": output},
        features=tuple(content.features),
    )


def scalars(*pairs: tuple[int, int], count: int, plus: tuple[int, ...]) -> tuple[Component, ...]:
    """Components of one scale each: (F16 bits, exponent), with one sign for each component."""
    return tuple(
        Component(axis="tensor", exponent=exponent, signs=bytes((positive,)) * count, scalar=(bits,))
        for (bits, exponent), positive in zip(pairs, plus, strict=True)
    )


def steps(
    slug: str, clause: str, dtype: str, base: list[int], parts: tuple[Component, ...], base_dtype: str | None = None
) -> Entry:
    """A module [1, n] over given base bits."""
    data = words(base, SIZE[base_dtype or dtype])
    return accepted(
        slug,
        clause,
        Content(modules=(sign("w", (1, len(base)), dtype=dtype, base_dtype=base_dtype, base=data, components=parts),)),
    )


def roundings() -> Iterator[Entry]:
    """SPEC 6: cases that show one rounding more, one less or another order."""
    one, near = ONE["BF16"], [0x3F80, 0x3F81, 0x3F82, 0xBF80, 0xBF81]
    half = (0x3C00, -8)  # Half a unit of BF16 at 1.
    for plus in (0, 1):
        yield steps(f"half-bf16-{plus}", "6.1", "BF16", near, scalars(half, count=5, plus=(plus,)))
        yield steps(
            f"half-f16-{plus}",
            "6.1",
            "F16",
            [0x3C00, 0x3C01, 0x3C02, 0xBC00, 0xBC01],
            scalars((0x3C00, -11), count=5, plus=(plus,)),
        )
        yield steps(
            f"half-f32-{plus}",
            "6.1",
            "F32",
            [0x3F800000, 0x3F800001, 0x3F800002, 0xBF800000, 0xBF800001],
            scalars((0x3C00, -24), count=5, plus=(plus,)),
        )
        yield steps(f"past-half-bf16-{plus}", "6.1", "BF16", near, scalars((0x3C01, -8), count=5, plus=(plus,)))
        yield steps(f"before-half-bf16-{plus}", "6.1", "BF16", near, scalars((0x3BFF, -8), count=5, plus=(plus,)))
    # 1 + 2^-8 + 2^-30 is more than half way in exact arithmetic and exactly half way after binary32.
    yield steps("binary32-before-dtype", "6.1", "BF16", near, scalars(half, (0x3C00, -30), count=5, plus=(1, 1)))
    yield steps(
        "binary32-before-dtype-f16",
        "6.1",
        "F16",
        [0x3C00, 0x3C01],
        scalars((0x3C00, -11), (0x3C00, -40), count=2, plus=(1, 1)),
    )
    # 1 + 2^-24 is 1 in binary32, twice; the sum of both terms first gives 1 + 2^-23.
    yield steps(
        "each-step-rounds", "6.1", "F32", [ONE["F32"]] * 2, scalars((0x3C00, -24), (0x3C00, -24), count=2, plus=(1, 1))
    )
    # (2^-60 + 2^40) - 2^40 is 0; in another order it is 2^-60.
    yield steps(
        "order-of-components",
        "6.1",
        "F32",
        [0, 0x80000000],
        scalars((0x3C00, -60), (0x3C00, 40), (0x3C00, 40), count=2, plus=(1, 1, 0)),
    )
    yield steps(
        "order-of-components-reversed",
        "6.1",
        "F32",
        [0, 0x80000000],
        scalars((0x3C00, 40), (0x3C00, 40), (0x3C00, -60), count=2, plus=(0, 1, 1)),
    )
    yield steps(
        "no-rounding-between",
        "6.1",
        "BF16",
        [one, one + 1],
        scalars((0x3C00, -9), (0x3C00, -9), (0x3C00, -9), count=2, plus=(1, 1, 1)),
    )
    yield steps(
        "base-wider-than-dtype",
        "6.1",
        "BF16",
        [0x3F807FFF, 0x3F808000, 0x3F808001],
        scalars((0x3C00, -24), count=3, plus=(1,)),
        "F32",
    )
    for plus in (0, 1):
        zero = scalars((0, 0), count=4, plus=(plus,))
        for dtype, negative in (("BF16", 0x8000), ("F16", 0x8000), ("F32", 0x80000000)):
            yield steps(f"zero-scale-{dtype.lower()}-{plus}", "6.1", dtype, [0, negative, ONE[dtype], 1], zero)
    yield steps(
        "cancels-to-plus-zero", "6.1", "F32", [0x3F800000, 0xBF800000], scalars((0x3C00, 0), count=2, plus=(0,))
    )
    yield steps("cancels-to-plus-zero-other", "6.1", "BF16", [0xBF80, 0x3F80], scalars((0x3C00, 0), count=2, plus=(1,)))
    for slug, dtype, base, pair in (
        ("subnormal-f32", "F32", [0, 1, 0x80000001, 0x7FFFFF], (1, -64)),
        ("subnormal-f16", "F16", [0, 1, 0x3FF, 0x8001], (0x0001, 0)),
        ("subnormal-f16-half", "F16", [0, 1, 2, 3], (0x0001, -1)),
        ("subnormal-bf16", "BF16", [0, 1, 0x7F, 0x8001], (0x0001, -64)),
        ("subnormal-scale", "F32", [0, 0x3F800000, 0xB3800000], (0x0001, 0)),
        ("subnormal-scale-3ff", "F32", [0, 0x38800000], (0x03FF, 0)),
    ):
        yield steps(slug, "6.1", dtype, base, scalars(pair, count=len(base), plus=(1,)))
    for value in (0x0001, 0x0200, 0x03FF):
        part = component(f"tiny {value}", (2, 3), "row+col", -64, row=(value, 1), col=(1, value, 0x3FF))
        yield accepted(
            f"smallest-products-{value:x}",
            "5.3",
            Content(modules=(sign("w", (2, 3), dtype="F32", base=bytes(24), components=(part,)),)),
        )
    huge = component("huge", (2, 3), "row+col", 63, row=(0x7BFF, 0x7BFE), col=(0x7BFF, 0x7BFD, 0x0001))
    yield accepted(
        "largest-products",
        "5.3",
        Content(modules=(sign("w", (2, 3), dtype="F32", base=bytes(24), components=(huge,)),)),
    )
    product = component("product", (2, 3), "row+col", 0, row=(0x3C01, 0x3FFF), col=(0x3C01, 0x3FFF, 0x3BFF))
    for dtype in SIZE:
        yield accepted(
            f"product-has-22-bits-{dtype.lower()}",
            "5.3",
            Content(modules=(sign("w", (2, 3), dtype=dtype, base=bytes(6 * SIZE[dtype]), components=(product,)),)),
        )
    wide = component("wide", (1, 2), "row+col", -40, row=(0x7BFF,), col=(0x7BFF, 0x7801))
    yield accepted(
        "product-over-f16", "5.3", Content(modules=(sign("w", (1, 2), dtype="F32", base=bytes(8), components=(wide,)),))
    )
    shifted = component("shifted", (1, 3), "row", 20, row=(0x7BFF,))
    yield accepted(
        "exponent-over-f16",
        "5.3",
        Content(modules=(sign("w", (1, 3), dtype="F32", base=bytes(12), components=(shifted,)),)),
    )
    yield steps("overflow-f16", "6.1", "F16", [0x7BFF, 0xFBFF, 0x7BFE], scalars((0x4C00, 0), count=3, plus=(1,)))
    yield steps("overflow-f16-below-half", "6.1", "F16", [0x7BFF, 0x7BFE], scalars((0x4BFF, 0), count=2, plus=(1,)))
    yield steps("overflow-f16-large", "6.1", "F16", [0, 0x8000], scalars((0x7BFF, 20), count=2, plus=(1,)))
    yield steps(
        "overflow-bf16", "6.1", "BF16", [0x7F7F, 0xFF7F], scalars((0x7BFF, 63), (0x7BFF, 63), count=2, plus=(1, 1))
    )
    yield steps(
        "overflow-bf16-half",
        "6.1",
        "BF16",
        [0x7F7F8000, 0x7F7F7FFF, 0xFF7F8000],
        scalars((0, 0), count=3, plus=(1,)),
        "F32",
    )
    # 65520 rounds to infinity in F16; back to 65504 only if the steps between are kept in binary32.
    yield steps(
        "overflow-only-at-the-end", "6.1", "F16", [0x7BFF], scalars((0x7BFF, 0), (0x7BFF, 0), count=1, plus=(1, 0))
    )
    for dtype, values in (
        ("BF16", [0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7F81, 0xFFFF]),
        ("F16", [0x7C00, 0xFC00, 0x7E00, 0xFE00, 0x7C01, 0xFFFF]),
        ("F32", [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF]),
    ):
        yield steps(f"not-finite-base-{dtype.lower()}", "6.2", dtype, values, scalars((BASE16, 0), count=6, plus=(1,)))
        yield accepted(
            f"same-keeps-nan-{dtype.lower()}",
            "6.3",
            Content(modules=(same("w", (6,), dtype=dtype, base=words(values, SIZE[dtype])),)),
        )
        yield accepted(
            f"full-keeps-nan-{dtype.lower()}",
            "6.4",
            Content(modules=(full("w", (6,), dtype=dtype, exact=words(values, SIZE[dtype])),)),
        )
