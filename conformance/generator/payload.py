"""Files with one fault in the payload (SPEC 4.3 to 5.4)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from .build import build
from .content import Asset, Content, component, full, same, sign, words
from .entry import Entry, refused
from .faults import bytes_at, patched, put
from .valid import simple

__all__ = ["payload"]

SIMPLE = simple(assets=(Asset(path="a.json", data=b"{}"), Asset(path="b.json", data=b"[]")))


def digests() -> Iterator[Entry]:
    """SPEC 4.3 and 4.4. Data of SIMPLE: mask at 0, row at 64, full at 128, assets at 192 and 256."""
    places = {
        "mask": (0, b"\xff"),
        "mask-last-byte": (4, b"\x00"),
        "scale": (64, b"\x01"),
        "scale-last": (69, b"\x3b"),
        "full": (128, b"\x55\x55"),
        "full-last": (137, b"\x55"),
    }
    for slug, (offset, value) in places.items():
        yield refused(f"damaged-{slug}", "E301", "4.3", build(SIMPLE, data=bytes_at(offset, value)))
    yield refused(
        "damaged-tail",
        "E301",
        "4.3",
        build(Content(modules=(same("w", (3, 2), base_rows=2),)), data=bytes_at(3, b"\x55")),
    )
    yield refused(
        "damaged-sign-tail",
        "E301",
        "4.3",
        build(Content(modules=(sign("w", (3, 2), base_rows=2),)), data=bytes_at(-1, b"\x55")),
    )
    for index, word in ((0, "sign"), (1, "full")):
        yield refused(
            f"digest-zeros-{word}", "E301", "4.3", build(SIMPLE, manifest=put("modules", index, "sha256", to="0" * 64))
        )
        yield refused(
            f"digest-of-nothing-{word}",
            "E301",
            "4.3",
            build(SIMPLE, manifest=put("modules", index, "sha256", to=hashlib.sha256().hexdigest())),
        )

    def digest_of(slug: str, content: Content, pick: Any) -> Entry:
        def edit(tensors: list[Any]) -> list[Any]:
            seen.append(hashlib.sha256(pick(tensors)).hexdigest())
            return tensors

        seen: list[str] = []
        return refused(
            f"digest-{slug}",
            "E301",
            "4.3",
            build(content, tensors=edit, manifest=lambda m: put("modules", 0, "sha256", to=seen[0])(m)),
        )

    yield digest_of("without-pads", SIMPLE, lambda t: t[0].data + t[2].data)
    yield digest_of("of-mask-only", SIMPLE, lambda t: t[0].data)
    yield digest_of("to-next-module", SIMPLE, lambda t: b"".join(x.data for x in t[:4]))
    swapped = Content(modules=(full("a", (32,)), full("b", (32,))))
    yield refused("modules-exchanged", "E301", "4.3", build(swapped, data=lambda d: d[64:] + d[:64]))
    yield refused("damaged-asset", "E302", "4.4", build(SIMPLE, data=bytes_at(192, b"[")))
    yield refused("damaged-second-asset", "E302", "4.4", build(SIMPLE, data=bytes_at(257, b"[")))
    yield refused("asset-digest-zeros", "E302", "4.4", build(SIMPLE, manifest=put("assets", 1, "sha256", to="0" * 64)))
    yield refused("assets-exchanged", "E302", "4.4", build(SIMPLE, data=lambda d: d[:192] + b"[]" + d[194:256] + b"{}"))


def bits() -> Iterator[Entry]:
    """SPEC 5.2 and 4.5."""
    for width, bad in ((1, 0x02), (1, 0x80), (7, 0x80), (9, 0x02), (11, 0x08), (11, 0x80), (65, 0x02)):
        content = Content(
            modules=(sign("w", (3, width), components=(component("c", (3, width), "row", signs=bytes(3 * width)),)),)
        )
        bytes_a_row = -(-width // 8)
        for slug, row in (("first", 1), ("last", 3)):
            yield refused(
                f"unused-bit-{width}-{bad:02x}-{slug}",
                "E303",
                "5.2",
                build(content, tensors=patched(0, row * bytes_a_row - 1, bytes((bad,)))),
            )
    second = Content(modules=(sign("w", (3, 9), ("row", "tensor")),))
    yield refused("unused-bit-second-component", "E303", "5.2", build(second, tensors=patched(4, -1, b"\x02")))
    batch = Content(modules=(full("v", (2,)), sign("w", (2, 2, 9), ("row",))))
    yield refused("unused-bit-batch", "E303", "5.2", build(batch, tensors=patched(2, 3, b"\x80")))
    for slug, index, offset, value in (
        ("in-module", 1, 0, b"\x01"),
        ("in-module-last", 1, -1, b"\x80"),
        ("between-modules", 3, 20, b"\xff"),
        ("before-asset", 5, -1, b"\x01"),
        ("between-assets", 7, 0, b" "),
        ("text", 3, 0, b"hidden"),
    ):
        yield refused(f"pad-{slug}", "E304", "4.5", build(SIMPLE, tensors=patched(index, offset, value)))


def scales() -> Iterator[Entry]:
    """SPEC 5.4."""
    bad = {
        "infinity": (0x7C00, "E305"),
        "nan": (0x7E00, "E305"),
        "signalling-nan": (0x7C01, "E305"),
        "minus-infinity": (0xFC00, "E305 E306"),
        "minus-nan": (0xFE00, "E305 E306"),
        "minus-zero": (0x8000, "E306"),
        "minus-one": (0xBC00, "E306"),
        "minus-smallest": (0x8001, "E306"),
    }
    plain = Content(modules=(full("v", (2,)), sign("w", (3, 9), ("row",))))
    for slug, (value, codes) in bad.items():
        yield refused(f"scale-{slug}", codes, "5.4", build(plain, tensors=patched(4, 2, words((value,)))))
    every = Content(modules=(sign("w", (3, 9), ("row", "col", "row+col", "tensor")),))
    # mask, pad, row, pad, mask, pad, col, pad, mask, pad, row, pad, col, pad, mask, pad, scalar
    for slug, index in (("row", 2), ("col", 6), ("row-col-row", 10), ("row-col-col", 12), ("tensor", 16)):
        yield refused(
            f"scale-{slug}-nan-last", "E305", "5.4", build(every, tensors=patched(index, -2, words((0x7E00,))))
        )
        yield refused(
            f"scale-{slug}-minus-first", "E306", "5.4", build(every, tensors=patched(index, 0, words((0x8001,))))
        )


def payload() -> Iterator[Entry]:
    """Every case of this module."""
    for group in (digests, bits, scales):
        yield from group()
