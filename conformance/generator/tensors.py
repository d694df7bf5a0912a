"""Files whose tensors are not those that the manifest asks for (SPEC 4.1, 4.2), and which step of SPEC 8 is first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from .build import build, frame
from .content import Asset, Content, full, same, sign
from .entry import Entry, refused
from .faults import drop_tensor, put, record, replaced, retensor, swapped
from .samples import ONE, SIMPLE

__all__ = ["orders", "tensors"]


def tensors() -> Iterator[Entry]:
    """SPEC 4.1 and 4.2. The tensors of SIMPLE: mask, pad, row, pad, full."""
    rich = Content(
        modules=(
            sign("w", (3, 3), ("row+col",), base_rows=2),
            full("v", (2,), dtype="U8"),
            sign("s", (8, 8), ("row",)),
        ),
        assets=(Asset(path="a.json", data=b"{}"), Asset(path="b.json", data=b"[]")),
    )
    square = Content(modules=(sign("w", (8, 8), ("row",)),))
    wrong = {
        "missing-last": (SIMPLE, {"tensors": lambda t: t[:-2], "digested": put("modules", 1, "sha256", to="ab" * 32)}),
        "extra-last": (
            Content(modules=(full("v", (64,), dtype="U8"),)),
            {"tensors": lambda t: [*t, dataclasses.replace(t[0], name="extra", owner=("other", 0))]},
        ),
        "mask-name": (SIMPLE, {"tensors": retensor(0, name="model.q_proj.weight.0.signs")}),
        "mask-index": (SIMPLE, {"tensors": retensor(0, name="model.q_proj.weight.1.mask")}),
        "module-name": (SIMPLE, {"tensors": retensor(4, name="model.norm.weigh.full")}),
        "name-case": (SIMPLE, {"tensors": retensor(4, name="model.norm.weight.FULL")}),
        "mask-signed": (SIMPLE, {"tensors": retensor(0, dtype="I8")}),
        "scale-bf16": (SIMPLE, {"tensors": retensor(2, dtype="BF16")}),
        "scale-u16": (SIMPLE, {"tensors": retensor(2, dtype="U16")}),
        "mask-flat": (SIMPLE, {"tensors": retensor(0, shape=(6,))}),
        "mask-transposed": (SIMPLE, {"tensors": retensor(0, shape=(2, 3))}),
        "scale-two-dimensions": (SIMPLE, {"tensors": retensor(2, shape=(3, 1))}),
        "full-flat": (Content(modules=(full("w", (2, 3)),)), {"tensors": retensor(0, shape=(6,))}),
        "full-dtype": (SIMPLE, {"tensors": retensor(4, dtype="F16")}),
        "full-bytes": (SIMPLE, {"tensors": retensor(4, dtype="U8", shape=(10,))}),
        "scale-of-other-axis": (square, {"tensors": retensor(2, name="w.0.col")}),
        "axis-of-other-scale": (square, {"manifest": put("modules", 0, "components", 0, "axis", to="col")}),
        "no-scale": (square, {"tensors": drop_tensor(-1)}),
        "scales-swapped": (rich, {"tensors": swapped(2, 4)}),
        "no-tail": (
            Content(modules=(same("w", (3,), base_rows=2), full("v", (1,)))),
            {"tensors": lambda t: [dataclasses.replace(t[0], name="w.full"), *t[1:]]},
        ),
        "row-col-without-col": (Content(modules=(sign("w", (8, 8), ("row+col",)),)), {"tensors": lambda t: t[:2]}),
        "module-order": (SIMPLE, {"manifest": lambda m: {**m, "modules": m["modules"][::-1]}}),
        "component-order": (
            Content(modules=(sign("w", (8, 8), ("row", "col")),)),
            {
                "manifest": put(
                    "modules", 0, "components", to=[{"axis": "col", "exponent": 0}, {"axis": "row", "exponent": 0}]
                )
            },
        ),
        "asset-missing": (
            rich,
            {"manifest": lambda m: {**m, "assets": [*m["assets"], {"path": "c.json", "sha256": "ab" * 32}]}},
        ),
        "asset-extra": (rich, {"manifest": lambda m: {**m, "assets": m["assets"][:1]}}),
        "asset-shape": (rich, {"tensors": lambda t: [*t[:-1], dataclasses.replace(t[-1], shape=(1, 2))]}),
        "asset-dtype": (rich, {"tensors": lambda t: [*t[:-1], dataclasses.replace(t[-1], dtype="I8")]}),
        "asset-name": (rich, {"tensors": lambda t: [*t[:-1], dataclasses.replace(t[-1], name="__asset__.2")]}),
        "asset-by-path": (rich, {"tensors": lambda t: [*t[:-1], dataclasses.replace(t[-1], name="__asset__.b.json")]}),
        "asset-first": (
            Content(
                modules=(full("v", (64,), dtype="U8"),), assets=(Asset(path="a.json", data=b"{" + b" " * 62 + b"}"),)
            ),
            {"tensors": swapped(0, 1)},
        ),
    }
    for slug, (content, hooks) in wrong.items():
        yield refused(f"tensors-{slug}", "E212", "4.1", build(content, **hooks))
    two_pads = Content(modules=(sign("w", (8, 8), ("row",)), full("v", (64,), dtype="U8"), full("u", (1,), dtype="U8")))
    pads = {
        "missing": (SIMPLE, {"tensors": drop_tensor(1)}),
        "all-missing": (SIMPLE, {"tensors": lambda t: [x for x in t if x.owner[0] != "pad"]}),
        "name": (SIMPLE, {"tensors": retensor(1, name="__padding__.0")}),
        "index": (SIMPLE, {"tensors": retensor(1, name="__pad__.7")}),
        "index-restarts": (
            SIMPLE,
            {
                "tensors": lambda t: [
                    x if x.name != "__pad__.1" else dataclasses.replace(x, name="__pad__.00") for x in t
                ]
            },
        ),
        "zero-filled-index": (SIMPLE, {"tensors": retensor(1, name="__pad__.00")}),
        "longer": (SIMPLE, {"tensors": retensor(1, shape=(122,), data=bytes(122))}),
        "of-16": (SIMPLE, {"tensors": retensor(1, shape=(10,), data=bytes(10))}),
        "two-for-one": (
            SIMPLE,
            {
                "tensors": lambda t: [
                    t[0],
                    dataclasses.replace(t[1], shape=(8,), data=bytes(8)),
                    dataclasses.replace(t[1], name="__pad__.1", shape=(50,), data=bytes(50)),
                    t[2],
                    dataclasses.replace(t[3], name="__pad__.2"),
                    t[4],
                ]
            },
        ),
        "not-needed": (
            two_pads,
            {
                "tensors": lambda t: [
                    *t[:5],
                    dataclasses.replace(t[1], name="__pad__.2", shape=(64,), data=bytes(64)),
                    t[5],
                ]
            },
        ),
        "shape": (SIMPLE, {"tensors": retensor(1, shape=(29, 2))}),
        "dtype": (SIMPLE, {"tensors": retensor(1, dtype="I8")}),
        "last": (
            SIMPLE,
            {"tensors": lambda t: [*t, dataclasses.replace(t[3], name="__pad__.2", shape=(54,), data=bytes(54))]},
        ),
        "first": (
            SIMPLE,
            {
                "tensors": lambda t: [
                    dataclasses.replace(t[1], shape=(64,), data=bytes(64)),
                    t[0],
                    dataclasses.replace(t[1], name="__pad__.1"),
                    t[2],
                    dataclasses.replace(t[3], name="__pad__.2"),
                    t[4],
                ]
            },
        ),
    }
    for slug, (content, hooks) in pads.items():
        yield refused(f"pad-{slug}", "E212", "4.2", build(content, **hooks))
    yield refused(
        "only-metadata",
        "E212",
        "4.1",
        build(ONE, tensors=lambda t: [], manifest=put("modules", 0, "sha256", to="ab" * 32)),
    )


def orders() -> Iterator[Entry]:
    """SPEC 8: two faults, and the step that comes first wins."""
    unknown = put("features", to=["x-conformance"])
    yield refused(
        "order-container-before-profile", "E124", "2.18", build(SIMPLE, manifest=unknown, file=lambda f: f[:-1])
    )
    yield refused(
        "order-duplicate-before-manifest",
        "E115",
        "2.9",
        build(SIMPLE, manifest=unknown, header=replaced('"dtype":"U8",', '"dtype":"U8","dtype":"U8",')),
    )
    yield refused(
        "order-version-before-json", "E201", "2.6", frame(b'{"__metadata__":{"format":"pxd","pxd":"9.9"', b"")
    )
    yield refused(
        "order-length-before-version",
        "E111",
        "2.4",
        build(SIMPLE, version="2.0", file=lambda f: (8184).to_bytes(8, "little") + f[8:4096]),
    )
    yield refused(
        "order-canonical-before-features", "E203", "3.2", build(SIMPLE, manifest=unknown, text=lambda t: t + " ")
    )
    yield refused(
        "order-features-before-schema",
        "E204",
        "3.3",
        build(SIMPLE, manifest=lambda m: {**m, "features": ["x-conformance"], "later": {}}),
    )
    yield refused(
        "order-profile-before-payload",
        "E205",
        "3.4",
        build(SIMPLE, manifest=put("zzz", to=1), data=lambda d: b"\xff" + d[1:]),
    )
    yield refused(
        "order-record-before-manifest", "E119", "2.13", build(SIMPLE, manifest=unknown, records=record(-1, dtype="F8"))
    )
