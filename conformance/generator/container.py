"""Files with one fault in the container (SPEC 2): kind, length, magic, version; two more modules hold the rest."""

from __future__ import annotations

from collections.abc import Iterator

from .build import MAGIC, build, frame, safetensors
from .entry import Entry, Special, refused
from .faults import replaced
from .json_faults import canonical_form, json_faults
from .records import extents, records
from .samples import SIMPLE

__all__ = ["container"]


def kinds() -> Iterator[Entry]:
    """SPEC 2.1 and 2.2: files that are not PXD files."""
    good = build(SIMPLE)
    yield refused("directory", "E101", "2.1", Special(kind="directory"))
    yield refused("fifo", "E101", "2.1", Special(kind="fifo"), "opening a pipe for reading waits for a writer")
    yield refused("file-of-2-53-bytes", "E102 E125", "2.1", Special(kind="sparse", source="valid/simple", size=2**53))
    yield refused("empty", "E103", "2.2", b"")
    yield refused("one-byte", "E103", "2.2", good[:1])
    yield refused("4095-bytes", "E103 E111", "2.2", good[:4095])
    yield refused(
        "lfs-pointer",
        "E104",
        "2.2",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n",
    )
    for slug, page in (
        ("doctype", b"<!DOCTYPE html><title>404</title>"),
        ("tag", b"<HTML><body>moved</body></HTML>"),
        ("white-space", b"\r\n\t <html>"),
    ):
        yield refused(f"html-{slug}", "E105", "2.2", page)
    yield refused("zip", "E106", "2.2", b"PK\x03\x04\x14\x00\x00\x00\x08\x00" + bytes(90))
    yield refused("zip-empty", "E106", "2.2", b"PK\x05\x06" + bytes(18))
    for protocol in (2, 3, 4, 5):
        yield refused(f"pickle-{protocol}", "E107", "2.2", bytes((0x80, protocol)) + b"cposix\nsystem\n(S'true'\ntR.")
    for size in (1, 8, 4096):
        yield refused(f"zeros-{size}", "E108", "2.2", bytes(size))
    yield refused("gguf", "E109", "2.2", b"GGUF\x03\x00\x00\x00" + bytes(64))
    yield refused("json", "E109", "2.2", b'{"__metadata__":{"format":"pxd","pxd":"1.0"}}')
    yield refused("pickle-0", "E109", "2.2", b"(dp0\n.")
    yield refused("small-safetensors", "E112", "2.2", safetensors({"w": ("U8", (1,), b"\x01")}))
    yield refused("byte-order-mark-first", "E109", "2.2", b"\xef\xbb\xbf" + good)


def lengths() -> Iterator[Entry]:
    """SPEC 2.3 and 2.4."""
    good = build(SIMPLE)
    wrong = {
        "not-a-page": 0x10F8,
        "248": 0xF8,
        "over-limit": 2**26 + 4088,
        "2-32-and-4088": 2**32 + 4088,
        "2-63-less-8": 2**63 - 8,
        "2-64-less-8": 2**64 - 8,
        "2-63-and-4088": 2**63 + 4088,
    }
    for slug, length in wrong.items():
        yield refused(f"length-{slug}", "E110", "2.3", length.to_bytes(8, "little") + good[8:])
    yield refused("length-past-end", "E111", "2.4", (8184).to_bytes(8, "little") + good[8:4096])
    yield refused("length-largest-past-end", "E111", "2.4", (2**26 - 8).to_bytes(8, "little") + good[8:])


def magics() -> Iterator[Entry]:
    """SPEC 2.5 and 2.6."""
    plain = safetensors({"w": ("U8", (1,), b"\x01")}, metadata="pt")
    header = plain[8:-1].rstrip(b" ")
    yield refused("ordinary-safetensors", "E112", "2.5", frame(header, b"\x01"))
    yield refused(
        "no-metadata", "E112", "2.5", frame(b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"\x01")
    )
    for slug, start in (
        ("format-pt", MAGIC.replace('"pxd","', '"pt","')),
        ("space", MAGIC.replace("{", "{ ", 1)),
        ("leading-space", " " + MAGIC),
        ("upper-case", MAGIC.replace('"format":"pxd"', '"format":"PXD"')),
        ("escape", MAGIC.replace('"format"', '"f\\u006frmat"')),
        ("version-is-number", MAGIC[:-1] + '1,"x":"'),
        ("byte-order-mark", "\ufeff" + MAGIC),
    ):
        yield refused(f"magic-{slug}", "E112", "2.5", build(SIMPLE, header=replaced(MAGIC, start)))
    for slug, version in (
        ("1-1", "1.1"),
        ("2-0", "2.0"),
        ("0-9", "0.9"),
        ("1", "1"),
        ("1-00", "1.00"),
        ("empty", ""),
        ("space", "1.0 "),
        ("v", "v1.0"),
    ):
        yield refused(f"version-{slug}", "E201", "2.6", build(SIMPLE, version=version))
    yield refused("version-escaped", "E201", "2.6", build(SIMPLE, header=replaced('"1.0"', '"1\\u002e0"')))
    yield refused(
        "version-2-other-header",
        "E201",
        "2.6",
        frame((MAGIC + '2.0","index":[1.5,{}]}}').encode(), b"data"),
        "a later version may change everything that follows it",
    )
    yield refused("version-without-end", "E201", "2.6", frame((MAGIC + "1.0").encode(), b""))
    yield refused("version-2-not-utf-8", "E201", "2.6", frame(MAGIC.encode() + b'2.0"\xff\xfe', b""))


def container() -> Iterator[Entry]:
    """Every case of this module."""
    for group in (kinds, lengths, magics, json_faults, records, canonical_form, extents):
        yield from group()
