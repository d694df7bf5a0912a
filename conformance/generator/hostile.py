"""Files made to exhaust, overflow or mislead a reader."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from .build import MAGIC, build, canonical, frame, header_json, manifest_text
from .content import Asset, Content, full
from .entry import Entry, Special, refused
from .faults import added, put, record, replaced
from .large import large_entries
from .samples import SIMPLE, TEXT
from .valid import simple

__all__ = ["hostile"]


def small() -> Iterator[Entry]:
    nested = "[" * 1500 + "]" * 1500
    yield refused("nested-1500", "E117", "2.11", build(SIMPLE, header=replaced('"shape":[5]', f'"shape":{nested}')))
    yield refused(
        "nested-unclosed", "E117 E114", "2.11", frame((MAGIC + '1.0","manifest":"{}"},"a":' + "[" * 3900).encode(), b"")
    )
    yield refused("manifest-nested-1500", "E202", "3.1", build(SIMPLE, text=replaced(f'"{TEXT}"', nested)))
    yield refused("manifest-is-nested-unclosed", "E202", "3.1", build(SIMPLE, text=lambda t: '{"a":' * 500))
    for slug, prefix in (
        ("ansi", "\x1b]0;owned\x07\x1b[2J"),
        ("bidi", "\u202e\u2066"),
        ("line", "ok\r\nE000"),
        ("zero-width", "\u200b"),
    ):
        yield refused(f"name-{slug}", "E206", "3.5", build(Content(modules=(full(prefix + "w", (1,), dtype="U8"),))))
        yield refused(
            f"asset-{slug}", "E211", "3.12", build(simple(assets=(Asset(path=prefix + ".json", data=b"{}"),)))
        )
        yield refused(f"feature-{slug}", "E204", "3.3", build(SIMPLE, manifest=put("features", to=[prefix])))
        yield refused(
            f"version-{slug}",
            "E201",
            "2.6",
            build(
                SIMPLE,
                header=replaced(
                    '"1.0"', f'"1.0{prefix}"'.replace("\x1b", "^").replace("\x07", "").replace("\r\n", " ")
                ),
            ),
        )
    for slug, path in (
        ("traversal", "../../etc/cron.d/job.json"),
        ("device", "/dev/null.json"),
        ("home", "~/.bashrc.txt"),
        ("drive", "C:\\boot.txt"),
        ("stream", "a.json:b.json"),
    ):
        yield refused(f"asset-{slug}", "E211", "3.12", build(simple(assets=(Asset(path=path, data=b"{}"),))))
    for slug, held, codes, clause in (
        ("end-2-53", [128, 2**53 - 1], "E121 E116", "2.15"),
        ("wrap-2-32", [128, 2**32 + 138], "E121 E116", "2.15"),
        ("end-2-63", [128, 2**63 - 1], "E116 E121", "2.10"),
        ("end-2-64", [128, 2**64 + 138], "E116 E121", "2.10"),
    ):
        yield refused(f"offsets-{slug}", codes, clause, build(SIMPLE, records=record(-1, data_offsets=held)))
    yield refused("shape-2-32", "E121 E120", "2.15", build(SIMPLE, records=record(-1, shape=[2**32, 5])))
    for slug, shape in (
        ("2-31", [2**31, 2**21]),
        ("eight-large", [2**52] * 8),
        ("2-62", [2**31, 2**31, 5]),
    ):
        yield refused(f"shape-{slug}", "E120 E121", "2.14", build(SIMPLE, records=record(-1, shape=shape)))
    for length in (2**63, 2**64 - 1, 2**62, 0x7FFFFFFFFFFFF0F8, 2**31 + 4088, 2**53 + 4088):
        # The first byte of the file must be 0xF8 (2.2), so other lengths are refused there.
        code = "E110" if length & 0xFF == 0xF8 else "E112"
        yield refused(
            f"length-{length:x}",
            code,
            "2.3" if code == "E110" else "2.2",
            length.to_bytes(8, "little") + build(SIMPLE)[8:],
        )
    largest = {"name": "w", "dtype": "U8", "shape": [2**53 - 1], "encoding": "same"}
    claims = build(Content(modules=(full("v", (1,), dtype="U8"),)), manifest=added(largest, "0" * 64))
    text_id = "sha256:" + hashlib.sha256(manifest_text(claims).encode()).hexdigest()
    yield Entry(
        id="claims-2-53-without-data",
        clause="3.9",
        files={"file": claims},
        expect={"content_id": text_id},
        note="a module that is the base's needs no bytes, however large",
        mib=128,
    )
    eight = [2**53 - 1] * 8
    wide = {**largest, "shape": eight[:7], "base": {"dtype": "U8", "shape": eight}}
    overflow = build(Content(modules=(full("v", (1,), dtype="U8"),)), manifest=added(wide, "0" * 64))
    yield refused("shapes-differ-2-53", "E208 E209", "3.8", overflow)
    text = canonical({"a": "b"})
    yield refused("manifest-of-one-key", "E205", "3.4", frame(header_json("1.0", text, []).encode(), b""))
    yield refused("only-magic", "E112", "2.5", frame(MAGIC.encode()[:-1], b""))
    yield Entry(
        id="symbolic-link",
        clause="2.1",
        files={"file": Special(kind="symlink", source="valid/simple")},
        expect={},
        note="hub caches hold links to regular files",
    )


def hostile() -> Iterator[Entry]:
    """Every case of this module."""
    yield from small()
    yield from large_entries()
