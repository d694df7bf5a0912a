"""Cases on the last value within a bound and the first beyond it: UTF-8, escapes, ends of a text, digests, names.

Each belongs to a change of one comparison or constant of a loader that no other case fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .binding import base_of
from .build import build, expected, frame, safetensors
from .content import Content, full, same, sign
from .entry import Entry, refused
from .faults import added, put, record, replaced
from .rebuild import apply
from .roundings import accepted
from .samples import ONE, SIMPLE, WHOLE
from .valid import simple

__all__ = ["applied_edges", "golden_edges", "refused_edges"]

NORM = "model.norm.weight"
# Sequences of one byte that is wrong, at each place, and the ends of what is too long or no first byte.
BROKEN = {
    "c1": b"\xc1\xbf",
    "overlong-3-last": b"\xe0\x9f\xbf",
    "overlong-4": b"\xf0\x80\x80\x80",
    "overlong-4-last": b"\xf0\x8f\xbf\xbf",
    "surrogate-last": b"\xed\xbf\xbf",
    "f5": b"\xf5\x80\x80\x80",
    "five-bytes": b"\xf8\x88\x80\x80\x80",
    "six-bytes": b"\xfc\x84\x80\x80\x80\x80",
    "second-of-2": b"\xc3(",
    "second-of-2-c0": b"\xc3\xc0",
    "second-of-3": b"\xe2(\xa1",
    "third-of-3": b"\xe2\x82(",
    "second-of-4": b"\xf0(\x8c\xbc",
    "third-of-4": b"\xf0\x90(\xbc",
    "fourth-of-4": b"\xf0\x90\x8c(",
}


def golden() -> Iterator[tuple[str, str, Content]]:
    """(slug, clause, content) of files that every reader accepts."""
    names = ("_", "_w", "w__", "-", ".", "a", "aa", "ab", "b")
    yield "names-underscore", "3.5", Content(modules=tuple(same(name, (2,)) for name in names))
    prefixes = ("a", "aa", "ab", "b", "b.", "b.bias", "c")
    yield "dropped-prefixes", "3.7", simple(dropped=prefixes)
    yield "tied-prefixes", "3.7", simple(tied=tuple((NORM, alias) for alias in prefixes))
    # The value of the shorter key is larger than the rest of the longer one.
    keys = {"": "z", "a": "z", "a\x01": "z", "ab": "\U0010ffff", "ab\ue000": "z", "b": ""}
    yield "metadata-prefixes", "3.2", simple(metadata=keys)
    controls = {f"{c:x}": chr(c) for c in range(0x20)} | {f"{c:x}-": f"{chr(c)}-" for c in range(0x20)}
    yield "metadata-each-control", "3.2", simple(metadata=controls)
    yield "metadata-key-of-64-kib", "3.8", simple(metadata={"k" * 2**16: ""})
    yield "mask-of-64-bytes", "4.2", Content(modules=(sign("w", (64, 3)), sign("v", (32, 11), ("col",))))


def golden_edges() -> Iterator[Entry]:
    """Files that every reader accepts."""
    for slug, clause, content in golden():
        file = build(content)
        yield Entry(id=slug, clause=clause, files={"file": file}, expect=expected(content, file))


def applied_edges() -> Iterator[Entry]:
    """Files that every loader applies."""
    yield accepted("mask-of-64-bytes", "5.3", Content(modules=(sign("w", (64, 3)), sign("v", (32, 11), ("col",)))))
    content = simple()
    long: dict[str, Any] = {"n" * 1025: ("U8", (1,), b"n"), "\U0001f9ea" * 2000: ("U8", (1,), b"e")}
    yield Entry(
        id="base-long-names-beside",
        clause="7.1",
        operation="apply",
        files={
            "file": build(content),
            "base": safetensors({**long, **base_of(content)}, metadata="pt"),
            "output": apply(content)[1],
        },
        note="1,024 bytes are the limit of a PXD file's names, not of a base's",
    )


def to_the_end(start: Callable[[str], str], ending: str) -> Callable[[str], str]:
    """A header that ends with `ending` and needs no spaces."""

    def edit(header: str) -> str:
        kept = start(header)
        return kept + "x" * (-(8 + len(kept) + len(ending)) % 4096) + ending

    return edit


def texts() -> Iterator[Entry]:
    """SPEC 2.7, 2.8, 2.16 and 3.1, 3.2: bytes and escapes of the header, and of the manifest."""
    for slug, raw in BROKEN.items():
        yield refused(f"utf8-{slug}", "E113", "2.7", build(SIMPLE, header=replaced("line of", raw)))
    for slug, escape in (
        ("x", "\\x001f"),
        ("upper-u", "\\U001f"),
        ("only-digits", "\\0001f"),
        ("not-hexadecimal", "\\u001g"),
        ("space", "\\u001 "),
        ("sign", "\\u+01f"),
    ):
        yield refused(f"escape-{slug}", "E114", "2.8", build(ONE, header=replaced('"w.full"', f'"{escape}w.full"')))
        yield refused(f"manifest-escape-{slug}", "E202", "3.1", build(SIMPLE, text=replaced("line of", escape)))
    for slug, escape in (
        ("101f", "\\u101f"),
        ("011f", "\\u011f"),
        ("002f", "\\u002f"),
        ("0020", "\\u0020"),
        ("001F", "\\u001F"),
        ("0022", "\\u0022"),
        ("000a", "\\u000a"),
    ):
        yield refused(f"escape-{slug}", "E122", "2.16", build(ONE, header=replaced('"w.full"', f'"{escape}w.full"')))
        yield refused(f"manifest-escape-{slug}", "E203", "3.2", build(SIMPLE, text=replaced("line of", escape)))
    yield refused("json-raw-1f", "E114", "2.8", build(SIMPLE, header=replaced("line of", "line\x1fof")))
    yield refused("manifest-raw-1f", "E202", "3.1", build(SIMPLE, text=replaced("line of", "line\x1fof")))
    prefix = replaced('"metadata":{"text":""}', '"metadata":{"ab":"","a":"z"}')
    file = build(simple(metadata={"text": ""}), text=prefix)
    yield refused("manifest-spelled-prefix-last", "E203", "3.2", file, "the key ab before the key a")


def endings() -> Iterator[Entry]:
    """SPEC 2.8 and 3.1: texts that end within a string or an escape; the header's with its last byte."""
    yield refused("json-open-string", "E114", "2.8", build(SIMPLE, header=lambda h: h[: h.rindex("weight.full")]))
    for slug, ending in (
        ("string", "x"),
        ("backslash", "\\"),
        ("escape", "\\u"),
        ("escape-of-2", "\\u00"),
        ("escape-of-3", "\\u001"),
        ("escape-of-4", "\\u001f"),
    ):
        cut = to_the_end(lambda h: h[: h.rindex("weight.full")], ending)
        yield refused(f"header-ends-in-{slug}", "E114", "2.8", build(SIMPLE, header=cut))
        within = build(SIMPLE, text=replaced('tied":[]}', ending))
        yield refused(f"manifest-ends-in-{slug}", "E202", "3.1", within)


def sizes() -> Iterator[Entry]:
    """SPEC 2.3, 2.9, 2.12 and 3.8: a header that is no page, names by their bytes, a tensor of 2^53 bytes."""
    whole = build(SIMPLE)
    header = whole[8 : 8 + int.from_bytes(whole[:8], "little")].rstrip(b" ")
    spaced = frame(header, whole[-138:], spaces=0x10F8 - len(header))
    yield refused("length-not-a-page-whole", "E110", "2.3", spaced, "all the rest of the file is sound")
    nameless = Content(modules=(full("a", (64,), dtype="U8"), full("b", (64,), dtype="U8")))
    twice = build(nameless, records=lambda r: [{**one, "name": ""} for one in r])
    yield refused("duplicate-tensor-of-no-name", "E115", "2.9", twice)
    for count, codes, clause in ((1024, "E212", "4.1"), (1025, "E118", "2.12")):
        escaped = build(ONE, records=record(0, name="\x01" * 2 + "n" * (count - 2)))
        yield refused(f"record-name-{count}-escaped", codes, clause, escaped, "an escape of six bytes is one byte")
    claimed = {
        "name": "v",
        "encoding": "same",
        "dtype": "F32",
        "shape": [2**51],
        "base": {"dtype": "BF16", "shape": [2**51]},
    }
    file = build(ONE, manifest=added(claimed, "0" * 64))
    yield refused("size-2-53-bytes-base-smaller", "E208", "3.8", file, "of a module that is the base's, widened")


def entries() -> Iterator[Entry]:
    """SPEC 3.4 and 3.5: digests whose first or last digit is none, the shortest reserved name."""
    for slug, digest in (("first", "g" + "ab" * 31 + "a"), ("last", "ab" * 31 + "ag")):
        for where, path, prefix in (
            ("asset-sha256", ("assets", 0, "sha256"), ""),
            ("calibration-digest", ("calibration", "digest"), "sha256:"),
            ("base-digest", ("base", "digest"), "sha256:"),
        ):
            file = build(WHOLE, manifest=put(*path, to=prefix + digest))
            yield refused(f"schema-{where}-not-hex-{slug}", "E205", "3.4", file)
    yield refused("name-two-underscores", "E206", "3.5", build(Content(modules=(full("__", (1,), dtype="U8"),))))
    yield refused("name-alias-two-underscores", "E206", "3.5", build(simple(tied=((NORM, "__"),))))
    yield refused("name-dropped-two-underscores", "E206", "3.5", build(simple(dropped=("__",))))


def ends() -> Iterator[Entry]:
    """SPEC 4.1: a header that ends before the tensor that is due."""
    for count in range(1, 5):
        modules = tuple(full(f"m{i}", (64,), dtype="U8") for i in range(count + 1))
        file = build(Content(modules=modules), records=lambda r: r[:-1], data=lambda d: d[:-64])
        yield refused(f"tensors-end-behind-{count}", "E212", "4.1", file)


def refused_edges() -> Iterator[Entry]:
    """Files that every reader refuses."""
    for group in (texts, endings, sizes, entries, ends):
        yield from group()
