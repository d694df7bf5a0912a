"""Apply cases with a wrong base or a damaged file (SPEC 7)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from .build import build, safetensors
from .content import Base, Content, Module, full, same, sign
from .entry import PHASES, Entry
from .faults import bytes_at, patched, put

__all__ = ["base_of", "bindings"]

SIZE = {"BF16": 2, "F16": 2, "F32": 4}


def base_of(content: Content) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {m.name: (m.base.dtype, m.base.shape, m.base.data) for m in content.modules if m.base}


def rejected(slug: str, codes: str, clause: str, content: Content, base: dict[str, Any], **hooks: Any) -> Entry:
    listed = tuple(codes.split())
    return Entry(
        id=slug,
        clause=clause,
        operation="apply",
        phase=PHASES[listed[0][1]],
        codes=listed,
        files={"file": build(content, **hooks), "base": safetensors(base, metadata="pt")},
    )


def bindings() -> Iterator[Entry]:
    """SPEC 7: a wrong base is refused, and so is a damaged file."""
    held = Base(dtype="F32", shape=(2,), data=b"12345678")
    content = Content(
        modules=(
            sign("q", (3, 9)),
            same("k", (4, 2)),
            full("n", (5,), base=held),
            full("new", (2,)),
            same("t", (5, 2), base_rows=4),
        )
    )
    good = base_of(content)
    yield rejected("base-empty-of-ours", "E401", "7.1", content, {"other.weight": good["q"]})
    yield rejected(
        "base-other-prefix", "E401", "7.1", content, {f"model.{name}": value for name, value in good.items()}
    )
    yield rejected("base-upper-case", "E401", "7.1", content, {name.upper(): value for name, value in good.items()})
    yield rejected("base-has-only-what-is-new", "E401", "7.1", content, {"new": ("BF16", (2,), bytes(4))})
    for name in good:
        yield rejected(
            f"base-lacks-{name}",
            "E402",
            "7.1",
            content,
            {other: value for other, value in good.items() if other != name},
        )
        dtype, shape, raw = good[name]
        yield rejected(
            f"base-dtype-{name}",
            "E403",
            "7.2",
            content,
            {**good, name: ({"BF16": "F16", "F32": "I32"}[dtype], shape, raw)},
        )
        yield rejected(
            f"base-flat-{name}", "E403", "7.2", content, {**good, name: (dtype, (len(raw) // SIZE[dtype], 1, 1), raw)}
        )
        yield rejected(
            f"base-bytes-{name}",
            "E404",
            "7.3",
            content,
            {**good, name: (dtype, shape, raw[:-1] + bytes((raw[-1] ^ 1,)))},
        )
    for name, (_, shape, raw) in good.items():
        yield rejected(f"base-unknown-dtype-{name}", "E403", "7.2", content, {**good, name: ("F9_NEW", shape, raw)})
    yield rejected("base-lacks-all-but-one", "E402", "7.1", content, {"k": good["k"]})
    yield rejected("base-transposed", "E403", "7.2", content, {**good, "q": ("BF16", (9, 3), good["q"][2])})
    yield rejected("base-more-rows", "E403", "7.2", content, {**good, "t": ("BF16", (5, 2), good["t"][2] + bytes(4))})
    yield rejected("base-fewer-rows", "E403", "7.2", content, {**good, "q": ("BF16", (2, 9), good["q"][2][:36])})
    shrunk = Content(modules=(sign("q", (2, 9), base_rows=3), same("k", (2, 2), base_rows=4)))
    for name, (dtype, shape, raw) in base_of(shrunk).items():
        yield rejected(
            f"base-bytes-unused-{name}",
            "E404",
            "7.3",
            shrunk,
            {**base_of(shrunk), name: (dtype, shape, raw[:-1] + b"\x77")},
        )
    yield rejected(
        "base-zero-sign", "E404", "7.3", shrunk, {**base_of(shrunk), "k": ("BF16", (4, 2), bytes(15) + b"\x80")}
    )
    yield rejected("apply-truncated", "E124", "2.18", content, good, file=lambda f: f[:-1])
    yield rejected(
        "apply-unknown-feature", "E204", "3.3", content, good, manifest=put("features", to=["x-conformance"])
    )
    yield rejected("apply-damaged", "E301", "4.3", content, good, data=bytes_at(0, b"\xff"))
    yield rejected("apply-damaged-full", "E301", "4.3", content, good, data=bytes_at(128, b"\x55\x55"))
    yield rejected("apply-unused-bit", "E303", "5.2", content, good, tensors=patched(0, 1, b"\x80"))
    yield rejected("apply-pad", "E304", "4.5", content, good, tensors=patched(0, 6, b"\x01"))
    yield rejected("apply-scale-nan", "E305", "5.4", content, good, tensors=patched(0, 64, b"\x00\x7e"))
    yield rejected("apply-scale-minus", "E306", "5.4", content, good, tensors=patched(0, 64, b"\x00\xbc"))
    yield rejected(
        "order-payload-before-binding", "E301", "4.3", content, {"other": good["q"]}, data=bytes_at(0, b"\xff")
    )
    yield rejected(
        "order-scale-before-binding", "E306", "5.4", content, {"other": good["q"]}, tensors=patched(0, 64, b"\x00\xbc")
    )
    claimed: Module = dataclasses.replace(same("w", (2,)), base=Base(dtype="BF16", shape=(2,), data=b"0000"))
    yield rejected("base-same-other-bytes", "E404", "7.3", Content(modules=(claimed,)), {"w": ("BF16", (2,), b"0001")})
