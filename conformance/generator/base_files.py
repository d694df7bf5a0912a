"""Bases whose safetensors file is unusual and sound, or malformed (SPEC 7.5)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from .binding import base_of
from .build import build
from .content import Content, full, same, sign
from .entry import Entry
from .rebuild import apply

__all__ = ["base_files"]

CONTENT = Content(modules=(sign("q", (2, 9)), same("k", (4,))))
HELD = base_of(CONTENT)
DATA = HELD["q"][2] + HELD["k"][2]
END = len(DATA)
LARGEST = 2**53 - 1
HIGH, LOW = "\\ud83e", "\\uddea"


def tensor(name: str, dtype: Any, shape: Any, begin: Any, end: Any) -> str:
    """A member of a header. name: as it is written."""
    fields = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return f'"{name}":{json.dumps(fields, separators=(",", ":"))}'


Q, K = tensor("q", "BF16", [2, 9], 0, 36), tensor("k", "BF16", [4], 36, END)
NONE = tensor("x", "U8", [0], END, END)


def file(header: str | bytes, data: bytes = DATA, *, longer: int = 0) -> bytes:
    """A safetensors file. longer: how much N is more than the header's length."""
    raw = header if isinstance(header, bytes) else header.encode()
    return (len(raw) + longer).to_bytes(8, "little") + raw + data


def beside(*members: str, data: bytes = b"") -> bytes:
    """The modules' tensors, then other members; data: what follows the modules' bytes."""
    return file("{" + ",".join([Q, K, *members]) + "}", DATA + data)


def with_value(value: str) -> bytes:
    """Metadata of any JSON text."""
    return beside(f'"__metadata__":{value}')


def spellings() -> Iterator[tuple[str, bytes]]:
    """Headers of other writers: white space, keys, escapes, values that nothing asks for."""
    yield "8-levels-in-a-record", beside(f'{NONE[:-1]},"":{"[" * 6 + "]" * 6}}}')
    scalar = tensor("s", "F32", [], END, END + 4)
    plain = f'{{"__metadata__":{{}},{Q},{K},{scalar}}}'
    more = DATA + b"1234"
    yield "spaces-first", file("  " + plain, more)
    yield "line-break-last", file(plain + "\n", more)
    yield "white-space", file(re.sub(r"([\[\]{}:,])", "\t \\1\r\n", plain), more)
    # N is 640 or 1152, so that the file begins as a pickle does.
    for length in (0x280, 0x480):
        yield f"spaces-to-{length}", file(plain.rjust(length), more)
    pairs = sorted(json.loads(plain).items(), reverse=True)
    turned = {name: dict(reversed(value.items())) if name in HELD else value for name, value in pairs}
    yield "other-order", file(json.dumps(turned), more)
    values = f'[{{"dtype":null,"a":[true,false,-0,{LARGEST},-{LARGEST}]}},{{}},[]]'
    longer = [member[:-1] + f',"shapes":{values},"":"dtype"}}' for member in (Q, K)]
    yield "more-keys", file("{" + ",".join(longer) + "}")
    escaped = [member.replace(f'"{name}"', f'"\\u00{ord(name):x}"', 1) for name, member in (("q", Q), ("k", K))]
    odd = f'\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\\u20AC\\u0000{HIGH}{LOW.upper().replace("U", "u")}'
    yield "escaped-names", file("{" + ",".join([*escaped, tensor(odd, "U8", [1], END, END + 1)]) + "}", DATA + b"x")
    dtype = K.replace('"BF16"', '"B\\u004616"').replace('"shape"', '"sh\\u0061pe"').replace('"data_', '"\\u0064ata_')
    yield "escaped-words", file("{" + Q + "," + dtype + "}")
    for slug, value in (
        ("null", "null"),
        ("number", "1"),
        ("text", '"\\u00e9 \u00e9 \U0001f9ea"'),
        ("8-levels", "[" * 7 + "]" * 7),
        ("8-levels-of-objects", '{"":' * 6 + "{}" + "}" * 6),
        ("like-tensors", '{"q":{"dtype":"F32"},"__metadata__":{"k":1}}'),
    ):
        yield f"metadata-{slug}", with_value(value)


def shapes() -> Iterator[tuple[str, bytes]]:
    """Tensors that the manifest does not name, in shapes that no PXD file has, and at other places."""
    yield "zero-written-minus", beside(NONE.replace("[0]", "[-0]"))
    empty = [tensor(f"e{at}", "F32", [3, 0], at, at) for at in (0, 36, END)]
    yield "empty-tensors", beside(*empty)
    yield (
        "empty-first",
        file("{" + ",".join([*empty[::-1], K, Q, tensor("s", "I8", [], END, END + 1)]) + "}", DATA + b"s"),
    )
    for slug, shape in (
        ("2-63", [2**32, 2**31, 0]),
        ("2-106", [LARGEST, LARGEST, 0]),
        ("zero-first", [0, LARGEST, LARGEST]),
        ("tenth-is-zero", [LARGEST] * 9 + [0]),
    ):
        yield f"empty-of-{slug}", beside(tensor("x", "U64", shape, END, END))
    for slug, shape in (
        ("8-dimensions", [1] * 7 + [5]),
        ("9-dimensions", [1] * 8 + [5]),
        ("64-dimensions", [1] * 63 + [5]),
        ("many-factors", [5, *[1] * 20]),
    ):
        yield slug, beside(tensor("x", "U8", shape, END, END + 5), data=b"12345")
    yield "10-dimensions", beside(tensor("x", "F4", [1] * 7 + [2, 3, 5], END, END + 15), data=b"x" * 15)
    for slug, shape in (("large", [LARGEST] * 9), ("64-dimensions", [2] * 64), ("odd", [3])):
        yield f"unknown-dtype-{slug}", beside(tensor("x", "F9_NEW", shape, END, END + 5), data=b"12345")
    ends = [(END + 3, END + 5), (END + 2, END + 3), (END, END + 2)]
    later = [tensor(f"x{begin}", "U8", [end - begin], begin, end) for begin, end in ends]
    yield "backwards", file("{" + ",".join([*later, K, Q]) + "}", DATA + b"12345")


def covers() -> Iterator[tuple[str, bytes]]:
    """Tensors that do not cover the data once, although those of the modules are sound."""
    one = tensor("x", "U8", [4], END, END + 4)
    yield "one-range-twice", beside(one, one.replace('"x"', '"y"'), data=b"1234")
    yield "overlap", beside(one, tensor("y", "U8", [3], END + 3, END + 6), data=b"123456")
    yield "overlap-of-a-module", beside(tensor("x", "U8", [36], 0, 36))
    yield "overlap-into-a-module", beside(tensor("x", "U8", [5], END - 1, END + 4), data=b"1234")
    yield "overlap-of-unknown-dtype", beside(tensor("x", "F9_NEW", [5], END - 1, END + 4), data=b"1234")
    yield "within-a-module", beside(tensor("x", "U8", [1], 8, 9))
    yield "empty-within-a-module", beside(tensor("x", "U8", [0], 8, 8))
    yield "empty-unknown-within-a-module", beside(tensor("x", "F9_NEW", [9], 8, 8))
    behind = [member.replace(f"[{a},{b}]", f"[{a + 4},{b + 4}]") for member, a, b in ((Q, 0, 36), (K, 36, END))]
    yield "gap-first", file("{" + ",".join(behind) + "}", b"1234" + DATA)
    yield "gap", beside(tensor("x", "U8", [1], END + 1, END + 2), data=b"12")
    yield "gap-last", beside(data=b"1")
    yield "gap-of-a-page", beside(data=bytes(4096))
    yield "gap-alone", file("{}", b"1")
    yield "ends-within-a-tensor", beside(tensor("x", "U8", [5], END, END + 5), data=b"1234")
    yield "ends-within-unknown-dtype", beside(tensor("x", "F9_NEW", [5], END, END + 5), data=b"1234")
    yield "ends-before-empty", beside(tensor("x", "U8", [0], END + 1, END + 1))
    there, back = tensor("x", "U8", [1], END, END + 1), tensor("y", "F9_NEW", [1], END + 1, END)
    yield "offsets-reversed", beside(there, back)
    yield "offsets-reversed-of-4-bytes", beside(tensor("x", "U8", [4], END + 4, END), data=b"1234")
    yield "begin-below-0", beside(tensor("x", "F9_NEW", [4], -4, 0))


def sizes() -> Iterator[tuple[str, bytes]]:
    """Tensors beside the modules' whose bytes are not those of their shape, or whose shape is none."""
    for slug, dtype, shape, size in (
        ("less-than-bytes", "U8", [3], 4),
        ("more-than-bytes", "U8", [5], 4),
        ("of-bytes", "BF16", [4], 4),
        ("scalar-of-nothing", "U8", [], 0),
        ("empty-of-1", "U8", [0], 1),
        ("wraps-to-0", "U8", [2**32, 2**32], 0),
        ("wraps-to-4", "F32", [2**31 + 1, 2**31], 4),
        ("bits-wrap-to-0", "U64", [2**30, 2**28], 0),
        ("half-byte", "F4", [3], 1),
        ("half-byte-rounded", "F4", [3], 2),
        ("ninth-ignored", "U8", [1] * 8 + [4], 1),
        ("ninth-not-ignored", "U8", [1] * 8 + [1], 4),
        ("ninth-is-zero", "U8", [1] * 7 + [4, 0], 4),
        ("65-dimensions", "U8", [1] * 65, 1),
        ("65-dimensions-of-unknown-dtype", "F9_NEW", [1] * 65, 1),
        ("two-below-0", "U8", [-2, -2], 4),
        ("below-0", "F9_NEW", [-1], 1),
        ("2-53", "F9_NEW", [2**53], 1),
        ("2-64", "U8", [2**64, 0], 0),
        ("whole-float", "U8", [1.0], 1),
        ("text", "U8", ["1"], 1),
        ("true", "U8", [True], 1),
        ("null", "U8", [None], 1),
        ("list", "U8", [[1]], 1),
        ("no-list", "U8", 1, 1),
        ("no-shape", "U8", None, 1),
        ("is-object", "U8", {}, 1),
    ):
        yield f"size-{slug}", beside(tensor("x", dtype, shape, END, END + size), data=b"1" * size)


def records() -> Iterator[tuple[str, bytes]]:
    """Members beside the modules' that are no records."""
    whole = {"dtype": "U8", "shape": [0], "data_offsets": [END, END]}
    for key in whole:
        yield (
            f"record-without-{key.replace('_', '-')}",
            beside(f'"x":{json.dumps({k: v for k, v in whole.items() if k != key})}'),
        )
        yield f"record-{key.replace('_', '-')}-twice", beside(NONE[:-1] + f',"{key}":{json.dumps(whole[key])}}}')
    offsets: dict[str, Any] = {
        "one": [END],
        "three": [END, END, END],
        "none": [],
        "null": None,
        "texts": [str(END), str(END)],
        "floats": [float(END), float(END)],
        "true": [True, True],
        "object": {"0": END, "1": END},
        "2-53": [END, 2**53 + END],
    }
    for slug, value in offsets.items():
        yield f"offsets-{slug}", beside(f'"x":{json.dumps({**whole, "data_offsets": value})}')
    for slug, value in (("null", None), ("number", 1), ("list", ["U8"])):
        yield f"dtype-{slug}", beside(f'"x":{json.dumps({**whole, "dtype": value})}')
    for slug, value in (
        ("null", None),
        ("list", ["U8", [0], [END, END]]),
        ("text", "U8"),
        ("number", 0),
        ("empty", {}),
    ):
        yield f"record-is-{slug}", beside(f'"x":{json.dumps(value)}')


def texts() -> Iterator[tuple[str, bytes]]:
    """Headers that are no JSON of SPEC 2.7 to 2.11."""
    plain = "{" + Q + "," + K + "}"
    yield "name-twice", beside(NONE, NONE)
    yield "module-twice", beside(K.replace("[4]", "[0]").replace("[36,", f"[{END},"))
    yield "module-twice-escaped", beside(NONE.replace('"x"', '"\\u006b"'))
    for point in (0x7F, 0x80, 0x7FF, 0x800, 0xFFFF, 0x10000, 0x10FFFF):
        units = chr(point).encode("utf-16-be").hex()
        escape = "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))
        pair = [NONE.replace('"x"', f'"{name}"') for name in (chr(point), escape)]
        yield f"name-twice-{point:x}", beside(*pair)
    yield "metadata-twice", beside('"__metadata__":{}', '"__metadata__":{}')
    yield "metadata-key-twice", with_value('{"a":"","b":"","a":""}')
    yield "key-twice-within", with_value('[{"b":[{"a":1,"\\u0061":1}]}]')
    for slug, value in (
        ("float", "1.5"),
        ("whole-float", "1.0"),
        ("exponent", "1e2"),
        ("2-53", str(2**53)),
        ("minus-2-53", str(-(2**53))),
        ("long", "9" * 40),
        ("zero-first", "01"),
        ("plus", "+1"),
        ("minus", "-"),
        ("minus-zero-first", "-01"),
        ("nan", "NaN"),
        ("infinity", "-Infinity"),
    ):
        yield f"number-{slug}", with_value(f"[{value}]")
    for slug, value in (
        ("9-levels", "[" * 8 + "]" * 8),
        ("9-levels-of-objects", '{"":' * 7 + "{}" + "}" * 7),
        ("10000-levels", "[" * 10000 + "]" * 10000),
        ("word", "nul"),
        ("word-in-capitals", "True"),
        ("word-in-parts", "n ull"),
        ("apostrophes", "'a'"),
        ("comma-last", "[1,]"),
        ("comma-first", "[,1]"),
        ("comma-last-in-object", '{"a":1,}'),
        ("comma-missing", "[1 1]"),
        ("colon-missing", '{"a" 1}'),
        ("key-is-number", "{1:1}"),
        ("no-value", ""),
        ("other-bracket", "[1}"),
        ("raw-control", '"\x1f"'),
        ("raw-line-break", '"\n"'),
        ("escape-x", '"\\x41"'),
        ("escape-short", '"\\u041"'),
        ("escape-not-hexadecimal", '"\\u004g"'),
        ("escape-sign", '"\\u+041"'),
        ("high-alone", f'"{HIGH}"'),
        ("high-before-letter", f'"{HIGH}uddea"'),
        ("high-before-escape", f'"{HIGH}\\n"'),
        ("high-before-character", f'"{HIGH}\\u0041"'),
        ("high-twice", f'"{HIGH}{HIGH}{LOW}"'),
        ("low-alone", f'"{LOW}"'),
        ("low-first", f'"{LOW}{HIGH}"'),
        ("no-break-space", "\u00a01"),
        ("vertical-tab", "\v1"),
    ):
        yield slug, with_value(value)
    yield "9-levels-in-a-record", beside(f'{NONE[:-1]},"":{"[" * 7 + "]" * 7}}}')
    yield "name-high-alone", beside(NONE.replace('"x"', f'"x{HIGH}"'))
    yield "name-low-alone", beside(NONE.replace('"x"', f'"{LOW}x"'))
    for slug, text in (
        ("text-behind", plain + "x"),
        ("nul-behind", plain + "\0"),
        ("object-behind", plain + "{}"),
        ("bracket-behind", plain + "}"),
        ("not-closed", plain[:-1]),
        ("ends-in-string", plain[:-1] + ',"x'),
        ("ends-in-escape", plain[:-1] + ',"\\'),
        ("comma-at-end", plain[:-1] + ",}"),
        ("array", "[" + plain + "]"),
        ("only-spaces", "  "),
        ("null", "null"),
    ):
        yield f"header-{slug}", file(text)
    yield "utf8-byte-order-mark", file(b"\xef\xbb\xbf" + plain.encode())
    yield "utf16", file(plain.encode("utf-16-le"))
    yield "utf16-with-mark", file(plain.encode("utf-16"))
    for slug, raw in (
        ("latin-1", b"\xe9"),
        ("overlong", b"\xc0\xaf"),
        ("surrogate", b"\xed\xa0\xbe"),
        ("cut", b"\xe2\x82"),
    ):
        header = plain[:-1].encode() + b',"__metadata__":"' + raw + b'"}'
        yield f"utf8-{slug}", file(header)


def lengths() -> Iterator[tuple[str, bytes]]:
    """Files whose N or end is wrong."""
    sound = beside()
    yield "empty", b""
    yield "7-bytes", (100).to_bytes(7, "little")
    yield "only-n", bytes(8)
    yield "n-is-0", bytes(8) + DATA
    yield "n-is-2-63", (2**63).to_bytes(8, "little") + sound[8:]
    yield "n-is-largest", b"\xff" * 8 + sound[8:]
    yield "n-larger-by-1", file("{" + Q + "," + K + "}", longer=1)
    yield "n-smaller-by-1", file("{" + Q + "," + K + "}", longer=-1)
    yield "header-cut", sound[:64]


def entry(slug: str, content: Content, base: bytes, *, phase: str | None) -> Entry:
    files = {"file": build(content), "base": base} | ({} if phase else {"output": apply(content)[1]})
    return Entry(id=f"base-file-{slug}", clause="7.5", operation="apply", phase=phase, files=files)


def base_files() -> Iterator[Entry]:
    """Every case of this module; those of a malformed base in any phase, since no code of SPEC 8 is for it."""
    for group in (spellings, shapes):
        for slug, base in group():
            yield entry(slug, CONTENT, base, phase=None)
    new = Content(modules=(full("new", (2,)),))
    yield entry("no-tensors", new, file("{ }", b""), phase=None)
    for refused in (covers, sizes, records, texts, lengths):
        for slug, base in refused():
            yield entry(slug, CONTENT, base, phase="any")
    twins = Content(modules=tuple(same(name, (4,), base=b"12345678") for name in "ab"))
    shared = ",".join(tensor(name, "BF16", [4], 0, 8) for name in "ab")
    yield entry("one-range-for-two-modules", twins, file("{" + shared + "}", b"12345678"), phase="any")
    yield entry("no-tensors-but-a-gap", new, file("{}", b"1"), phase="any")
    yield entry("no-tensors-and-n-beyond-file", new, file("{}", b"", longer=1), phase="any")
