"""Files whose header is not strict JSON, or not canonical (SPEC 2.7 to 2.11, 2.16)."""

from __future__ import annotations

import json
from collections.abc import Iterator

from .build import MAGIC, build, frame, header_json
from .entry import Entry, refused
from .faults import replaced
from .samples import SIMPLE
from .valid import padded_to, simple

__all__ = ["canonical_form", "json_faults"]


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
        "tensor": replaced('"model.norm.weight.full":', '"model.q_proj.weight.delta":'),
        "metadata-as-tensor": replaced('"model.norm.weight.full":', '"__metadata__":'),
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
    for slug, number in (("point", "128.0"), ("2-64-and-128", "18446744073709551744")):
        yield refused(
            f"number-offset-{slug}",
            "E116",
            "2.10",
            build(SIMPLE, header=replaced('"data_offsets":[128,', f'"data_offsets":[{number},')),
        )
    for slug, value in (
        ("9", "[" * 7 + "]" * 7),
        ("objects-9", '{"a":' * 7 + "0" + "}" * 7),
        ("1000", "[" * 998 + "]" * 998),
    ):
        yield refused(
            f"depth-{slug}", "E117", "2.11", build(SIMPLE, header=replaced('"shape":[5]', f'"shape":{value}'))
        )


def canonical_form() -> Iterator[Entry]:
    """SPEC 2.16."""
    spelled = {
        "space": replaced('"shape":', '"shape": '),
        "space-in-array": replaced("[0,128]", "[0, 128]"),
        "newline": replaced('},"model', '},\n"model'),
        "escaped-name": replaced('"model.norm.weight.full"', '"model.norm.weigh\\u0074.full"'),
        "escaped-slash": replaced("line of", "line\\/of"),
        "escaped-field": replaced('"dtype"', '"dt\\u0079pe"'),
        "field-order": replaced('"dtype":"U8","shape":[128]', '"shape":[128],"dtype":"U8"'),
        "escaped-text": replaced("line of", "\\u006cine of"),
        "minus-zero": replaced('"data_offsets":[0,128]', '"data_offsets":[-0,128]'),
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
