"""Files whose tensors do not match the manifest (SPEC 4.1, 4.2), and the order of the steps of SPEC 8."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from .build import Record, Tensor, build, frame
from .content import Asset, Content, Module, full, same, sign
from .entry import Entry, refused
from .faults import drop_tensor, put, record, replaced, retensor, swapped
from .samples import ONE, PADDED, SIMPLE

__all__ = ["orders", "tensors"]


def tensors() -> Iterator[Entry]:
    """SPEC 4.1 and 4.2. The tensors of SIMPLE: a delta of 128 bytes, and the norm."""
    rich = Content(
        modules=(sign("w", (3, 3), ("row+col",), base_rows=2), full("v", (2,), dtype="U8"), sign("s", (8, 8))),
        assets=(Asset(path="a.json", data=b"{}"), Asset(path="b.json", data=b"[]")),
    )
    plain = Content(modules=(full("v", (64,), dtype="U8"),))
    tail = Content(modules=(same("w", (3,), base_rows=2), full("v", (1,))))
    wrong: dict[str, tuple[Content, dict[str, Any]]] = {
        "missing-last": (SIMPLE, {"records": lambda r: r[:-1], "data": lambda d: d[:128]}),
        "extra-last": (plain, {"tensors": lambda t: [*t, dataclasses.replace(t[0], name="extra", owner=("other", 0))]}),
        "delta-name": (SIMPLE, {"tensors": retensor(0, name="model.q_proj.weight.mask")}),
        "delta-as-full": (SIMPLE, {"tensors": retensor(0, name="model.q_proj.weight.full")}),
        "delta-bare": (SIMPLE, {"tensors": retensor(0, name="model.q_proj.weight")}),
        "module-name": (SIMPLE, {"tensors": retensor(1, name="model.norm.weigh.full")}),
        "name-case": (SIMPLE, {"tensors": retensor(1, name="model.norm.weight.FULL")}),
        "delta-signed": (SIMPLE, {"tensors": retensor(0, dtype="I8")}),
        "delta-wider": (SIMPLE, {"tensors": retensor(0, dtype="F16", shape=(64,))}),
        "delta-two-dimensions": (SIMPLE, {"tensors": retensor(0, shape=(2, 64))}),
        "full-flat": (Content(modules=(full("w", (2, 3)),)), {"tensors": retensor(0, shape=(6,))}),
        "full-transposed": (Content(modules=(full("w", (2, 3)),)), {"tensors": retensor(0, shape=(3, 2))}),
        "full-dtype": (SIMPLE, {"tensors": retensor(1, dtype="F16")}),
        "full-bytes": (SIMPLE, {"tensors": retensor(1, dtype="U8", shape=(10,))}),
        "full-as-delta": (SIMPLE, {"tensors": retensor(1, name="model.norm.weight.delta")}),
        "tail-as-full": (tail, {"tensors": retensor(0, name="w.full", dtype="BF16", shape=(1,), data=b"xx")}),
        "tail-typed": (tail, {"tensors": retensor(0, dtype="BF16", shape=(32,))}),
        "no-tail": (tail, {"records": lambda r: offsets_of(r[1:]), "data": lambda d: d[64:]}),
        "module-order": (SIMPLE, {"records": exchanged}),
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
    yield from delta_sizes()
    yield from pads()
    yield refused(
        "only-metadata",
        "E212",
        "4.1",
        build(ONE, records=lambda r: [], data=lambda d: b""),
    )


def offsets_of(records: list[Record]) -> list[Record]:
    """The same records, the first one at 0."""
    start = records[0]["data_offsets"][0]
    return [{**r, "data_offsets": [x - start for x in r["data_offsets"]]} for r in records]


def exchanged(records: list[Record]) -> list[Record]:
    """The two records in the other order, each as large as it is."""
    (a, b), end = records, records[1]["data_offsets"][1]
    middle = end - a["data_offsets"][1]
    return [{**b, "data_offsets": [0, middle]}, {**a, "data_offsets": [middle, end]}]


def delta_sizes() -> Iterator[Entry]:
    """SPEC 4.2: parts begin at multiples of 64, and the end is one."""
    two = sign("w", (3, 11), ("row+col",))

    def edited(slug: str, module: Module, edit: Any) -> Entry:
        def resized(tensors: list[Tensor]) -> list[Tensor]:
            data = edit(tensors[0].data)
            return [dataclasses.replace(tensors[0], data=data, shape=(len(data),)), *tensors[1:]]

        return refused(f"delta-{slug}", "E212", "4.1", build(Content(modules=(module,)), tensors=resized))

    # mask of 6 bytes at 0, rows of 6 at 64, columns of 22 at 128; 192 in all
    yield edited("not-filled", two, lambda d: d[:150])
    yield edited("packed", two, lambda d: d[:6] + d[64:70] + d[128:150])
    yield edited("of-16", two, lambda d: d[:16] + d[64:80] + d[128:160])
    yield edited("one-part-less", two, lambda d: d[:128])
    yield edited("one-part-more", two, lambda d: d + bytes(64))
    yield edited("one-byte-more", two, lambda d: d + bytes(1))
    yield edited("of-one-axis", sign("w", (3, 11), ("row",)), lambda d: d + d[64:])
    yield edited("without-tail", sign("w", (3, 11), base_rows=2), lambda d: d[:128])
    yield edited("tail-not-filled", same("w", (3,), base_rows=2), lambda d: d[:2])
    yield edited("of-no-base-rows", same("w", (60, 1), base_rows=3), lambda d: d + bytes(64))


def pads() -> Iterator[Entry]:
    """SPEC 4.2. The tensors of PADDED: full, pad, full, pad, delta."""
    two_pads = Content(
        modules=(
            full("a", (3,), dtype="U8"),
            full("b", (3,), dtype="U8"),
            full("v", (64,), dtype="U8"),
            full("u", (1,)),
        )
    )

    def last(tensors: list[Tensor]) -> list[Tensor]:
        return [*tensors, dataclasses.replace(tensors[1], name="__pad__.2")]

    wrong: dict[str, tuple[Content, dict[str, Any]]] = {
        "missing": (PADDED, {"tensors": drop_tensor(1)}),
        "all-missing": (PADDED, {"tensors": lambda t: [x for x in t if x.owner[0] != "pad"]}),
        "name": (PADDED, {"tensors": retensor(1, name="__padding__.0")}),
        "index": (PADDED, {"tensors": retensor(1, name="__pad__.7")}),
        "index-restarts": (PADDED, {"tensors": retensor(3, name="__pad__.00")}),
        "zero-filled-index": (PADDED, {"tensors": retensor(1, name="__pad__.00")}),
        "longer": (PADDED, {"tensors": retensor(1, shape=(125,), data=bytes(125))}),
        "of-16": (PADDED, {"tensors": retensor(1, shape=(13,), data=bytes(13))}),
        "two-for-one": (
            PADDED,
            {
                "tensors": lambda t: [
                    t[0],
                    dataclasses.replace(t[1], shape=(8,), data=bytes(8)),
                    dataclasses.replace(t[1], name="__pad__.1", shape=(53,), data=bytes(53)),
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
        "behind-a-delta": (
            Content(modules=(sign("w", (3, 11)), full("u", (1,)))),
            {
                "tensors": lambda t: [
                    dataclasses.replace(t[0], data=t[0].data[:70], shape=(70,)),
                    Tensor(name="__pad__.0", dtype="U8", shape=(58,), data=bytes(58), owner=("pad", 0)),
                    t[1],
                ]
            },
        ),
        "shape": (PADDED, {"tensors": retensor(3, shape=(27, 2))}),
        "dtype": (PADDED, {"tensors": retensor(1, dtype="I8")}),
        "last": (Content(modules=(full("a", (3,), dtype="U8"), full("b", (3,)))), {"tensors": last}),
        "first": (
            PADDED,
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
    for slug, (content, hooks) in wrong.items():
        clause = "4.1" if slug == "behind-a-delta" else "4.2"
        yield refused(f"pad-{slug}", "E212", clause, build(content, **hooks))


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
