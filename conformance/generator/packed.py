"""Types whose elements take 4 or 6 bits, and others without arithmetic (SPEC 1, 2.14): read, refused, applied."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from .build import build, expected
from .content import BITS, Base, Content, full, noise, same, weights
from .encoded import accepted as written
from .encoded import refusal, source
from .entry import Entry, refused
from .faults import added, record
from .roundings import accepted
from .samples import ONE

__all__ = ["applied_packed", "encoded_packed", "golden_packed", "refused_packed"]

# type -> the smallest number of elements that takes whole bytes.
LEAST = {"F4": 2, "F6_E2M3": 4, "F6_E3M2": 4}
SUM = "0" * 64


def slug_of(dtype: str) -> str:
    return dtype.lower().replace("_", "-")


def base(dtype: str, shape: tuple[int, ...]) -> Base:
    return Base(dtype=dtype, shape=shape, data=weights(f"base {dtype}", dtype, shape))


def kept() -> Iterator[tuple[str, str, Content]]:
    """(slug, clause, content): whole tensors, rows that end inside a byte, tails, fewer rows, another base."""
    for dtype, least in LEAST.items():
        slug = slug_of(dtype)
        yield f"full-{slug}", "2.14", Content(modules=tuple(full(f"w.{n}", (n,), dtype=dtype) for n in (least, 8)))
        yield f"full-{slug}-odd-rows", "2.14", Content(modules=(full("w", (4, 3), dtype=dtype), full("v", (3,))))
        yield f"full-{slug}-other-base", "3.9", Content(modules=(full("w", (8,), dtype=dtype, base=base("U8", (3,))),))
        yield f"full-on-{slug}", "3.9", Content(modules=(full("w", (3, 2), base=base(dtype, (4, 3))),))
        yield f"same-{slug}", "3.9", Content(modules=(same("w", (4, 3), dtype=dtype),))
        grown = same("w", (3 * least, 1), dtype=dtype, base_rows=least)
        yield f"same-{slug}-tail", "3.10", Content(modules=(grown, same("v", (5, 4), dtype=dtype, base_rows=2)))
        yield f"same-{slug}-fewer-rows", "3.10", Content(modules=(same("w", (least, 1), dtype=dtype, base_rows=8),))
    wide = tuple(full(f"w.{dtype}", (40_004,), dtype=dtype, exact=noise(dtype, 5_000 * bits + bits // 2))
                 for dtype, bits in BITS.items() if dtype in LEAST)  # fmt: skip
    yield "packed-more-than-64-ki", "2.14", Content(modules=wide)


def golden_packed() -> Iterator[Entry]:
    """Files that every reader accepts."""
    for slug, clause, content in kept():
        file = build(content)
        yield Entry(id=slug, clause=clause, files={"file": file}, expect=expected(content, file))


def applied_packed() -> Iterator[Entry]:
    """These files, applied; `same` of every type without arithmetic, with more and with fewer rows."""
    for slug, _, content in kept():
        if not slug.startswith("packed"):
            yield accepted(slug, "6.4" if slug.startswith("full") else "6.3", content)
    for dtype in ("C64", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"):
        modules = (same("w", (4, 3), dtype=dtype, base_rows=2), same("v", (1,), dtype=dtype, base_rows=3))
        yield accepted(f"carried-{slug_of(dtype)}", "6.3", Content(modules=(*modules, full("u", (3,), dtype=dtype))))


def refused_packed() -> Iterator[Entry]:
    """SPEC 2.14, 3.8, 3.9: fractional bytes, sizes beyond the limit, conversions."""
    for dtype, least in LEAST.items():
        slug, bits = slug_of(dtype), BITS[dtype]
        for count in sorted({1, least - 1, least + 1, 7 + least // 2}):
            if count % least == 0:
                continue
            data = noise("part", count * bits // 8 + 1)
            one = Content(modules=(full("w", (count,), dtype=dtype, exact=data),))
            if count in (1, least + 1):
                yield refused(f"shape-{slug}-of-{count}-rounded-up", "E120 E121", "2.14", build(one))
            less = Content(modules=(full("w", (count,), dtype=dtype, exact=data[:-1] or b"x"),))
            yield refused(f"shape-{slug}-of-{count}", "E120 E121", "2.14", build(less))
        yield refused(f"shape-{slug}-bits-as-bytes", "E121", "2.15", build(Content(modules=(
            full("w", (8,), dtype=dtype, exact=bytes(8)),))))  # fmt: skip
        for side, claimed in (("", (least + 1,)), ("-of-base", (8,))):
            odd = base(dtype, (least + 1,) if side else (8,))
            module = full("w", claimed, dtype=dtype) if not side else full("w", (1,), dtype="U8", base=odd)
            said = {"name": "v", "encoding": "same", "dtype": dtype, "shape": list(claimed)}
            file = build(Content(modules=(module,))) if side else build(ONE, manifest=added(said, SUM))
            yield refused(f"size-{slug}-no-bytes{side}", "E208", "3.8", file)
        other = "U8" if dtype == "F4" else "F4" if dtype == "F6_E2M3" else "F6_E2M3"
        yield refused(f"same-{slug}-on-{slug_of(other)}", "E209", "3.9", build(Content(modules=(
            same("w", (8,), dtype=dtype, base_dtype=other),))))  # fmt: skip
    for slug, said in (
        ("same", {"name": "v", "encoding": "same", "dtype": "F99", "shape": [2]}),
        ("same-bf16", {"name": "v", "encoding": "same", "dtype": "bf16", "shape": [2]}),
        ("same-empty", {"name": "v", "encoding": "same", "dtype": "", "shape": [2]}),
    ):
        yield refused(f"dtype-of-nothing-stored-{slug}", "E205", "3.4", build(ONE, manifest=added(said, SUM)))
    foreign = {"name": "w", "encoding": "full", "dtype": "U8", "shape": [1], "base": {"dtype": "F99", "shape": [2]}}
    sums = (SUM, hashlib.sha256(ONE.modules[0].exact).hexdigest())
    yield refused("dtype-of-base-alone", "E205", "3.4", build(ONE, manifest=added(foreign, *sums, replace=True)))
    # 2^54 elements of 4 bits are 2^53 bytes; 2^62 of them have 2^64 bits.
    for slug, shape in (("2-53", [2**27, 2**27]), ("wraps-to-0", [2**31, 2**31]), ("wraps-to-4", [2**31 + 1, 2**31])):
        said = {"name": "v", "encoding": "same", "dtype": "F4", "shape": shape}
        yield refused(f"size-f4-{slug}", "E208", "3.8", build(ONE, manifest=added(said, SUM)))
        edit = record(0, dtype="F4", shape=shape)
        yield refused(f"shape-f4-{slug}", "E120 E121", "2.14", build(ONE, records=edit))
    for dtype in ("F4", "C64"):
        for slug, kind, base_kind in (("on-f32", dtype, "F32"), ("f32-on", "F32", dtype)):
            one = Content(modules=(same("w", (8,), dtype=kind, base_dtype=base_kind),))
            yield refused(f"same-{slug}-{slug_of(dtype)}", "E209", "3.9", build(one))


def encoded_packed() -> Iterator[Entry]:
    """SPEC 11: a writer writes them, but none of half a byte."""
    every = tuple(full(f"w.{dtype}", (4, 2), dtype=dtype) for dtype in BITS)
    yield written("every-dtype", "11.1", Content(modules=every))
    kept_rows = tuple(same(f"w.{dtype}", (4, 2), dtype=dtype, base_rows=2) for dtype in BITS)
    yield written("same-every-dtype", "11.1", Content(modules=kept_rows))
    for dtype, least in LEAST.items():
        odd = Content(modules=(full("w", (least + 1,), dtype=dtype, exact=noise("odd", 4)),))
        yield refusal(f"{slug_of(dtype)}-no-bytes", source(odd))
