"""Files with one fault in the container (SPEC 2)."""

from __future__ import annotations

import json
from collections.abc import Iterator

from .build import MAGIC, build, frame, header_json, safetensors
from .content import Content, full, same
from .entry import Entry, Special, refused
from .faults import bytes_at, record, replaced, swapped
from .valid import padded_to, simple

__all__ = ["container"]

TEXT = "one line of text in the middle"
SIMPLE = simple(metadata={"text": TEXT})


def kinds() -> Iterator[Entry]:
    """SPEC 2.1 and 2.2: what is no PXD file at all."""
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
    yield refused("byte-order-mark-first", "E109", "2.7", b"\xef\xbb\xbf" + good)


def lengths() -> Iterator[Entry]:
    """SPEC 2.3 and 2.4."""
    good = build(SIMPLE)
    wrong = {
        "not-a-page": 0x10F8,
        "248": 0xF8,
        "over-limit": 2**24 + 4088,
        "2-32-and-4088": 2**32 + 4088,
        "2-63-less-8": 2**63 - 8,
        "2-64-less-8": 2**64 - 8,
        "2-63-and-4088": 2**63 + 4088,
    }
    for slug, length in wrong.items():
        yield refused(f"length-{slug}", "E110", "2.3", length.to_bytes(8, "little") + good[8:])
    yield refused("length-past-end", "E111", "2.4", (8184).to_bytes(8, "little") + good[8:4096])
    yield refused("length-largest-past-end", "E111", "2.4", (2**24 - 8).to_bytes(8, "little") + good[8:])


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


def json_faults() -> Iterator[Entry]:
    """SPEC 2.7 to 2.11."""
    broken = {
        "ff": b"\xff",
        "overlong": b"\xc0\x80",
        "overlong-3": b"\xe0\x80\xaf",
        "surrogate": b"\xed\xa0\x80",
        "surrogate-pair": b"\xed\xa0\xbd\xed\xb8\x80",
        "too-large": b"\xf4\x90\x80\x80",
        "cut": b"\xe2\x82",
        "continuation": b"\x80",
        "latin-1": b"\xe9 ",
    }
    for slug, raw in broken.items():
        yield refused(f"utf8-{slug}", "E113", "2.7", build(SIMPLE, header=replaced("line of", raw)))
    yield refused(
        "utf8-in-name", "E113", "2.7", build(SIMPLE, header=replaced("model.norm.weight.full", b"model.\xff"))
    )
    wrong = {
        "open-object": lambda h: h[:-1],
        "two-objects": lambda h: h + "{}",
        "text-after": lambda h: h + "x",
        "brace-after": lambda h: h + "}",
        "newline-after": lambda h: h + "\n",
        "tab-after": lambda h: h + " \t ",
        "nul-after": lambda h: h + "\0",
        "trailing-comma": lambda h: h[:-1] + ",}",
        "no-colon": replaced('"shape":', '"shape"'),
        "single-quotes": replaced('"shape"', "'shape'"),
        "bare-key": replaced('"shape"', "shape"),
        "comment": replaced('"shape":', '/**/"shape":'),
        "raw-control": replaced("line of", "line\tof"),
        "raw-nul": replaced("line of", "line\0of"),
        "bad-escape": replaced("line of", "line \\x41"),
        "short-escape": replaced("line of", "\\u12g4"),
        "nan": replaced('"shape":[5]', '"shape":[NaN]'),
        "infinity": replaced('"shape":[5]', '"shape":[-Infinity]'),
        "true-upper": replaced('"shape":[5]', '"shape":[True]'),
        "leading-zero": replaced('"shape":[5]', '"shape":[05]'),
        "plus": replaced('"shape":[5]', '"shape":[+5]'),
        "hexadecimal": replaced('"shape":[5]', '"shape":[0x5]'),
        "trailing-point": replaced('"shape":[5]', '"shape":[5.]'),
        "array-comma": replaced('"shape":[5]', '"shape":[5,]'),
        "digit-not-ascii": replaced('"shape":[5]', '"shape":[\u0665]'),
        "no-break-space": replaced('"shape":[5]', '"shape":[\u00a05]'),
    }
    for slug, edit in wrong.items():
        yield refused(f"json-{slug}", "E114 E116", "2.8", build(SIMPLE, header=edit))
    yield refused("json-nothing-after-version", "E114", "2.8", frame((MAGIC + '1.0"').encode(), b""))
    last = '"data_offsets":'
    twice = {
        "tensor": replaced('"model.norm.weight.full":', '"model.q_proj.weight.0.mask":'),
        "metadata-object": lambda h: h[:-1] + "," + h[1 : h.index('},"model.q') + 1] + "}",
        "metadata-key": replaced('"pxd":"1.0",', '"pxd":"1.0","pxd":"1.0",'),
        "field": replaced('"dtype":"U8",', '"dtype":"U8","dtype":"U8",'),
        "offsets": replaced(last, last + "[0,0]," + last),
        "escaped": replaced('"dtype":"U8",', '"dtype":"U8","\\u0064type":"U8",'),
    }
    for slug, edit in twice.items():
        yield refused(f"duplicate-{slug}", "E115", "2.9", build(SIMPLE, header=edit))
    numbers = {
        "point": "5.0",
        "exponent": "5e0",
        "exponent-upper": "50E-1",
        "2-53": "9007199254740992",
        "2-64-and-5": "18446744073709551621",
        "400-digits": "5" + "0" * 400,
        "huge-exponent": "1e400",
        "negative-2-53": "-9007199254740992",
    }
    for slug, number in numbers.items():
        yield refused(
            f"number-{slug}", "E116 E120", "2.10", build(SIMPLE, header=replaced('"shape":[5]', f'"shape":[{number}]'))
        )
    for slug, number in (("point", "64.0"), ("2-64-and-64", "18446744073709551680")):
        yield refused(
            f"number-offset-{slug}",
            "E116",
            "2.10",
            build(SIMPLE, header=replaced('"data_offsets":[64,', f'"data_offsets":[{number},')),
        )
    for slug, value in (
        ("9", "[" * 7 + "]" * 7),
        ("objects-9", '{"a":' * 7 + "0" + "}" * 7),
        ("1000", "[" * 998 + "]" * 998),
    ):
        yield refused(
            f"depth-{slug}", "E117", "2.11", build(SIMPLE, header=replaced('"shape":[5]', f'"shape":{value}'))
        )


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
        "offset-true": record(0, data_offsets=[False, 6]),
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
        ("c64", "C64"),
        ("e8m0", "F8_E8M0"),
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
    for slug, name in (("e8m0", "F8_E8M0"), ("nothing", ""), ("i4", "I4"), ("lower-case", "u8")):
        yield refused(f"dtype-of-one-byte-{slug}", "E119", "2.13", build(SIMPLE, records=record(0, dtype=name)))
    spans = {
        "longer": [128, 139],
        "shorter": [128, 137],
        "reversed": [138, 128],
        "element-count": [128, 133],
        "empty": [138, 138],
        "negative": [-10, 0],
        "2-53": [2**53 - 11, 2**53 - 1],
    }
    for slug, held in spans.items():
        yield refused(
            f"offsets-{slug}", "E121 E123 E124 E118", "2.15", build(SIMPLE, records=record(-1, data_offsets=held))
        )
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


def canonical_form() -> Iterator[Entry]:
    """SPEC 2.16."""
    spelled = {
        "space": replaced('"shape":', '"shape": '),
        "space-in-array": replaced("[3,2]", "[3, 2]"),
        "newline": replaced('},"model', '},\n"model'),
        "escaped-name": replaced('"model.norm.weight.full"', '"model.norm.weigh\\u0074.full"'),
        "escaped-slash": replaced("line of", "line\\/of"),
        "escaped-field": replaced('"dtype"', '"dt\\u0079pe"'),
        "field-order": replaced('"dtype":"U8","shape":[3,2]', '"shape":[3,2],"dtype":"U8"'),
        "escaped-text": replaced("line of", "\\u006cine of"),
        "minus-zero": replaced('"data_offsets":[0,6]', '"data_offsets":[-0,6]'),
        "offsets-first": replaced(
            '"dtype":"BF16","shape":[5],"data_offsets":[128,138]', '"data_offsets":[128,138],"dtype":"BF16","shape":[5]'
        ),
        "escaped-delete": replaced("line of", "line\\u007fof"),
        "escaped-accent": replaced("line of", "line \\u00e9"),
        "lone-surrogate": replaced("line of", "line \\ud800"),
        "escaped-dtype": replaced('"U8"', '"\\u0055\\u0038"'),
    }
    for slug, edit in spelled.items():
        yield refused(f"header-{slug}", "E122 E116 E114", "2.16", build(SIMPLE, header=edit))
    controls = simple(metadata={"text": "\b\x1f"})
    yield refused("header-long-escape", "E122", "2.16", build(controls, header=replaced("\\\\b", "\\u005cb")))
    yield refused("header-one-page-more", "E122", "2.16", build(SIMPLE, header=lambda h: h + " " * 4096))
    yield refused("header-sixteen-pages-more", "E122", "2.16", build(SIMPLE, header=lambda h: h + " " * 4096 * 16))
    exact = build(padded_to(4088))
    yield refused(
        "header-full-and-a-page",
        "E122",
        "2.16",
        (8184).to_bytes(8, "little") + exact[8:4096] + b" " * 4096 + exact[4096:],
    )
    text = json.loads(exact[8:4096])["__metadata__"]["manifest"]
    late = header_json("1.0", text, [{"name": "w.full", "dtype": "U8", "shape": [1], "data_offsets": [0, 1]}])
    head, tail = late.split('},"w.full"')
    moved = '{"w.full"' + tail[:-1] + "," + head[1:] + "}}"
    yield refused("metadata-last", "E112", "2.5", frame(moved.encode(), b"\x07"))


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
    yield refused("hole-swapped", "E123", "2.17", build(SIMPLE, records=lambda r: [r[0], r[2], r[1], *r[3:]]))
    for slug, extra in (("zero", b"\0"), ("newline", b"\n"), ("page", bytes(4096)), ("pad", bytes(54))):
        yield refused(f"after-data-{slug}", "E125", "2.18", build(SIMPLE, file=lambda f, extra=extra: f + extra))
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


def container() -> Iterator[Entry]:
    """Every case of this module."""
    for group in (kinds, lengths, magics, json_faults, records, canonical_form, extents):
        yield from group()
