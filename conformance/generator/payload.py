"""Files with one fault in the payload (SPEC 4.3 to 5.4)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from .build import build, table, untabled
from .content import Asset, Content, component, full, same, sign, words
from .entry import Entry, refused
from .faults import bytes_at, patched, put
from .samples import PADDED
from .valid import simple

__all__ = ["payload"]

SIMPLE = simple(assets=(Asset(path="a.json", data=b"{}"), Asset(path="b.json", data=b"[]")))


def digested(index: int, digest: str) -> Any:
    """Put another value into the table of digests."""

    def edit(manifest: dict[str, Any]) -> dict[str, Any]:
        held = untabled(manifest["digests"])
        held[index] = digest
        return {**manifest, "digests": table(held)}

    return edit


def digests() -> Iterator[Entry]:
    """SPEC 4.3 and 4.4. Data of SIMPLE: mask at 0, row at 64, full at 128, assets at 192 and 256.

    Its digests: base and tensor of the sign module, tensor of the norm.
    """
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
    for index, word in ((1, "sign"), (2, "full")):
        yield refused(f"digest-zeros-{word}", "E301", "4.3", build(SIMPLE, manifest=digested(index, "0" * 64)))
        nothing = hashlib.sha256().hexdigest()
        yield refused(f"digest-of-nothing-{word}", "E301", "4.3", build(SIMPLE, manifest=digested(index, nothing)))

    def digest_of(slug: str, pick: Any) -> Entry:
        file = build(SIMPLE)
        digest = hashlib.sha256(pick(file[8 + int.from_bytes(file[:8], "little") :])).hexdigest()
        return refused(f"digest-{slug}", "E301", "4.3", build(SIMPLE, manifest=digested(1, digest)))

    yield digest_of("without-gaps", lambda d: d[:6] + d[64:70])
    yield digest_of("without-last-gap", lambda d: d[:70])
    yield digest_of("of-mask-only", lambda d: d[:6])
    yield digest_of("to-next-module", lambda d: d[:138])
    exchange = build(SIMPLE, manifest=lambda m: {**m, "digests": table([untabled(m["digests"])[i] for i in (0, 2, 1)])})
    yield refused("digests-exchanged", "E301", "4.3", exchange)
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
    # mask at 0, row at 64, mask at 128
    second = Content(modules=(sign("w", (3, 9), ("row", "tensor")),))
    yield refused("unused-bit-second-component", "E303", "5.2", build(second, tensors=patched(0, 128 + 5, b"\x02")))
    batch = Content(modules=(full("v", (2,)), sign("w", (2, 2, 9), ("row",))))
    yield refused("unused-bit-batch", "E303", "5.2", build(batch, tensors=patched(2, 3, b"\x80")))
    # full, pad, full, pad, delta (mask of 6 bytes, rows of 6), pad before the assets
    padded = Content(modules=PADDED.modules, assets=SIMPLE.assets)
    for slug, index, offset, value in (
        ("between-modules", 1, 0, b"\x01"),
        ("between-modules-last", 3, -1, b"\x80"),
        ("text", 3, 0, b"hidden"),
        ("between-assets", 6, 0, b" "),
    ):
        yield refused(f"pad-{slug}", "E304", "4.5", build(padded, tensors=patched(index, offset, value)))
    for slug, offset, value in (
        ("behind-mask", 6, b"\x01"),
        ("before-scales", 63, b"\x80"),
        ("behind-scales", 70, b"\x01"),
        ("last", -1, b"\x01"),
        ("text", 72, b"hidden"),
    ):
        yield refused(f"gap-{slug}", "E304", "4.5", build(padded, tensors=patched(4, offset, value)))
    tails = Content(modules=(same("w", (3, 2), base_rows=2), sign("v", (3, 9), base_rows=2)))
    for slug, index, offset in (("tail", 0, 4), ("sign-tail", 1, 128 + 18), ("before-tail", 1, 127)):
        yield refused(f"gap-{slug}", "E304", "4.5", build(tails, tensors=patched(index, offset, b"\x01")))


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
        yield refused(f"scale-{slug}", codes, "5.4", build(plain, tensors=patched(2, 64 + 2, words((value,)))))
    every = Content(modules=(sign("w", (3, 9), ("row", "col", "row+col", "tensor")),))
    # masks of 6 bytes at 0, 128, 256 and 448; rows of 6, columns of 18 and the scalar behind them
    for slug, first, last in (
        ("row", 64, 68),
        ("col", 192, 208),
        ("row-col-row", 320, 324),
        ("row-col-col", 384, 400),
        ("tensor", 512, 512),
    ):
        file = build(every, tensors=patched(0, last, words((0x7E00,))))
        yield refused(f"scale-{slug}-nan-last", "E305", "5.4", file)
        file = build(every, tensors=patched(0, first, words((0x8001,))))
        yield refused(f"scale-{slug}-minus-first", "E306", "5.4", file)


def payload() -> Iterator[Entry]:
    """Every case of this module."""
    for group in (digests, bits, scales):
        yield from group()
