"""Files with a malformed record, or with records that do not match the data (SPEC 2.12 to 2.15, 2.17, 2.18)."""

from __future__ import annotations

import json
from collections.abc import Iterator

from .build import MAGIC, build
from .content import Content, full, same
from .entry import Entry, refused
from .faults import bytes_at, record, replaced, swapped
from .samples import PADDED, SIMPLE

__all__ = ["extents", "records"]


def records() -> Iterator[Entry]:
    """SPEC 2.12 to 2.15."""
    whole = '{"dtype":"BF16","shape":[5],"data_offsets":[128,138]}'
    wrong = {
        "no-dtype": record(-1, dtype=None),
        "no-shape": record(-1, shape=None),
        "no-offsets": record(-1, data_offsets=None),
        "extra-key": record(-1, extra=1),
        "dtype-number": record(-1, dtype=16),
        "dtype-null": replaced_null("dtype"),
        "shape-number": record(-1, shape=5),
        "shape-text": record(-1, shape="5"),
        "shape-of-text": record(-1, shape=["5"]),
        "shape-of-true": record(-1, shape=[5, True]),
        "shape-of-null": record(-1, shape=[5, "null"]),
        "shape-nested": record(-1, shape=[[5]]),
        "one-offset": record(-1, data_offsets=[128]),
        "three-offsets": record(-1, data_offsets=[128, 138, 138]),
        "offsets-object": record(-1, data_offsets={"begin": 128, "end": 138}),
        "offsets-text": record(-1, data_offsets=["128", "138"]),
        "offset-true": record(0, data_offsets=[False, 128]),
    }
    for slug, edit in wrong.items():
        yield refused(f"record-{slug}", "E118", "2.12", build(SIMPLE, records=edit))
    long = build(Content(modules=(full("w", (1,), dtype="U8"),)), records=record(0, name="n" * 1025))
    yield refused("record-name-1025", "E118", "2.12", long, "a name of 1,024 bytes is the manifest's matter (4.1)")
    wide = build(Content(modules=(full("w", (1,), dtype="U8"),)), records=record(0, name="\U0001f9ea" * 257))
    yield refused("record-name-1028-bytes", "E118", "2.12", wide, "257 characters")
    for slug, value in (
        ("array", '["BF16",[5],[128,138]]'),
        ("null", "null"),
        ("text", '"BF16"'),
        ("true", "true"),
        ("empty", "{}"),
    ):
        yield refused(f"record-is-{slug}", "E118", "2.12", build(SIMPLE, header=replaced(whole, value)))
    metadata = {
        "extra": replaced('"pxd":"1.0",', '"pxd":"1.0","note":"",'),
        "after": replaced('"},"model.q', '","note":""},"model.q'),
        "no-manifest": lambda h: MAGIC + '1.0"}' + h[h.index('},"model.q') + 1 :],
        "manifest-object": lambda h: MAGIC + '1.0","manifest":{}}' + h[h.index('},"model.q') + 1 :],
        "manifest-null": lambda h: MAGIC + '1.0","manifest":null}' + h[h.index('},"model.q') + 1 :],
    }
    for slug, edit in metadata.items():
        yield refused(f"metadata-{slug}", "E118 E122", "2.12", build(SIMPLE, header=edit))
    for slug, name in (
        ("lower-case", "bf16"),
        ("unknown", "F8"),
        ("empty", ""),
        ("c128", "C128"),
        ("e3m4", "F8_E3M4"),
        ("f6", "F6"),
        ("torch", "torch.bfloat16"),
    ):
        yield refused(f"dtype-{slug}", "E119", "2.13", build(SIMPLE, records=record(-1, dtype=name)))
    shapes = {
        "zero": ([5, 0], [128, 138]),
        "zero-bytes": ([0], [128, 128]),
        "nine": ([1] * 8 + [5], [128, 138]),
        "negative": ([-5], [128, 138]),
        "two-negatives": ([-5, -1], [128, 138]),
        "product-2-64": ([2**32, 2**31], [128, 128]),
        "product-wraps-to-10": ([1693293930026579, 5447], [128, 138]),
        "product-2-53": ([2**26, 2**26], [128, 2**53 - 1]),
        "many-zeros": ([2**53 - 1, 0], [128, 128]),
    }
    for slug, (shape, held) in shapes.items():
        yield refused(
            f"shape-{slug}", "E120 E121 E118", "2.14", build(SIMPLE, records=record(-1, shape=shape, data_offsets=held))
        )
    # 5447 * 1693293930026579 * 2 = 2^64 + 10, and 2^32 * 2^31 * 2 = 2^64: in 64 bits these sizes are 10 and 0.
    yield refused(
        "shape-wraps-to-nothing",
        "E120",
        "2.14",
        build(SIMPLE, records=record(-1, shape=[2**32, 2**31], data_offsets=[128, 128]), data=lambda d: d[:128]),
    )
    for slug, name in (("e4m3fn", "F8_E4M3FN"), ("nothing", ""), ("i4", "I4"), ("lower-case", "u8")):
        yield refused(f"dtype-of-one-byte-{slug}", "E119", "2.13", build(SIMPLE, records=record(0, dtype=name)))
    spans = {
        "longer": [128, 139],
        "shorter": [128, 137],
        "reversed": [138, 128],
        "element-count": [128, 133],
        "empty": [138, 138],
        "negative": [-10, 0],
    }
    for slug, held in spans.items():
        yield refused(
            f"offsets-{slug}", "E121 E123 E124 E118", "2.15", build(SIMPLE, records=record(-1, data_offsets=held))
        )
    far = record(-1, data_offsets=[2**53 - 11, 2**53 - 1])
    yield refused("offsets-2-53", "E123 E121", "2.17", build(SIMPLE, records=far))
    yield refused(
        "full-of-no-bytes", "E120", "2.14", build(Content(modules=(full("w", (3,)), full("e", (0,), exact=b""))))
    )


def replaced_null(key: str):  # type: ignore[no-untyped-def]
    """A record whose field is null."""

    def edit(records):  # type: ignore[no-untyped-def]
        made = json.loads(json.dumps(records))
        made[-1][key] = None
        return made

    return edit


def extents() -> Iterator[Entry]:
    """SPEC 2.17 and 2.18."""
    yield refused(
        "gap",
        "E123 E124 E125",
        "2.17",
        build(SIMPLE, records=record(-1, data_offsets=[192, 202]), data=lambda d: d[:128] + bytes(64) + d[128:]),
    )
    yield refused(
        "gap-at-start",
        "E123",
        "2.17",
        build(
            Content(modules=(full("w", (5,)),)), records=record(0, data_offsets=[64, 74]), data=lambda d: bytes(64) + d
        ),
    )
    yield refused(
        "overlap", "E123", "2.17", build(SIMPLE, records=record(-1, data_offsets=[64, 74]), data=lambda d: d[:128])
    )
    two = Content(modules=(full("a", (64,), dtype="U8"), full("b", (64,), dtype="U8")))
    yield refused(
        "same-bytes-twice", "E123", "2.17", build(two, records=record(1, data_offsets=[0, 64]), data=lambda d: d[:64])
    )
    yield refused("records-not-in-order", "E123", "2.17", build(two, records=swapped(0, 1)))
    yield refused("hole-swapped", "E123", "2.17", build(PADDED, records=lambda r: [r[0], r[2], r[1], *r[3:]]))
    for slug, extra in (("zero", b"\0"), ("newline", b"\n"), ("page", bytes(4096)), ("pad", bytes(54))):
        yield refused(f"after-data-{slug}", "E125", "2.18", build(SIMPLE) + extra)
    bare = Content(modules=(same("w", (3, 4)),))
    yield refused("after-header", "E125", "2.18", build(bare, file=lambda f: f + b"\0"))
    yield refused("data-short-by-half", "E124", "2.18", build(SIMPLE, file=lambda f: f[:-5]))
    yield refused(
        "data-claims-2-52",
        "E124",
        "2.18",
        build(SIMPLE, records=record(-1, dtype="U8", shape=[2**52], data_offsets=[128, 128 + 2**52])),
        "a header of 4 KiB claims 2^52 bytes",
        mib=128,
    )
    yield refused("first-byte", "E112", "2.2", build(SIMPLE, file=bytes_at(0, b"\xf0")))
