"""Files with one fault in the manifest's text, features or schema (SPEC 3.1 to 3.4, 3.7)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from .build import build, manifest_text, table, untabled
from .content import Content, full, same
from .entry import Entry, refused
from .faults import put, removed, replaced
from .samples import SIMPLE, TEXT, WHOLE
from .valid import simple

__all__ = ["manifest"]

PATHS: dict[str, tuple[Any, ...]] = {
    "top": (),
    "base": ("base",),
    "calibration": ("calibration",),
    "fine-tuned": ("fine_tuned",),
    "producer": ("producer",),
    "asset": ("assets", 0),
    "module": ("modules", 0),
    "module-base": ("modules", 0, "base"),
}
KEYS = {
    "top": "assets base calibration digests dropped features fine_tuned metadata modules producer tied",
    "base": "digest id revision",
    "calibration": "digest samples seed sequence_length source",
    "fine-tuned": "id revision",
    "producer": "name version",
    "asset": "path sha256",
    "module": "components name shape",
    "module-base": "dtype shape",
}


def texts() -> Iterator[Entry]:
    """SPEC 3.1 and 3.2."""
    wrong = {
        "empty": lambda t: "",
        "word": lambda t: "manifest",
        "cut": lambda t: t[:-1],
        "twice": lambda t: t + t,
        "trailing-comma": lambda t: t[:-1] + ",}",
        "number": lambda t: "1",
        "null": lambda t: "null",
        "array": lambda t: f"[{t}]",
        "raw-control": replaced("line of", "line\tof"),
        "nan": replaced("[5]", "[NaN]"),
        "leading-zero": replaced("[5]", "[05]"),
        "bad-escape": replaced("line of", "line \\x41"),
        "single-quotes": replaced('"text"', "'text'"),
        "newline-last": lambda t: t + "\n",
    }
    for slug, edit in wrong.items():
        yield refused(f"manifest-{slug}", "E202", "3.1", build(SIMPLE, text=edit))
    twice = {
        "top": replaced('"dropped":[]', '"dropped":[],"dropped":[]'),
        "module": replaced('"encoding":"full"', '"encoding":"full","encoding":"full"'),
        "module-base": replaced('"base":null', '"base":null,"base":null'),
        "base": replaced('"revision":"0123abcd"', '"revision":"0123abcd","revision":"0123abcd"'),
        "metadata": replaced('"text":', '"text":"","text":'),
        "producer": replaced('"version":"1"', '"version":"1","version":"1"'),
        "fine-tuned": replaced('"revision":null', '"revision":null,"revision":null'),
        "escaped": replaced('"text":', '"te\\u0078t":"","text":'),
    }
    for slug, edit in twice.items():
        yield refused(f"manifest-duplicate-{slug}", "E202", "3.1", build(SIMPLE, text=edit))
    numbers = {
        "point": "5.0",
        "exponent": "5e0",
        "2-53": "9007199254740992",
        "400-digits": "5" + "0" * 400,
        "negative-2-53": "-9007199254740992",
    }
    for slug, number in numbers.items():
        yield refused(f"manifest-number-{slug}", "E202", "3.1", build(SIMPLE, text=replaced("[5]", f"[{number}]")))
    for slug, value in (("9", "[" * 7 + "]" * 7), ("1000", "[" * 1000 + "]" * 1000)):
        yield refused(f"manifest-depth-{slug}", "E202", "3.1", build(SIMPLE, text=replaced(f'"{TEXT}"', value)))
    spelled = {
        "space-first": lambda t: " " + t,
        "space-last": lambda t: t + " ",
        "space-inside": replaced('"dropped":[]', '"dropped": []'),
        "key-order": lambda t: '{"tied":[],' + t[1:].replace(',"tied":[]', ""),
        "module-key-order": replaced(
            '"name":"model.norm.weight","shape":[5]', '"shape":[5],"name":"model.norm.weight"'
        ),
        "escape": replaced("line of", "\\u006cine of"),
        "slash": replaced("line of", "line\\/of"),
        "minus-zero": replaced('["row",-3]', '["row",-0]'),
        "escape-case": lambda t: t.replace(TEXT, "\\u001F"),
        "long-escape": replaced(TEXT, "\\u000a"),
        "escape-delete": replaced(TEXT, "\\u007f"),
        "escape-accent": replaced(TEXT, "\\u00e9"),
        "escape-emoji": replaced(TEXT, "\\ud83e\\uddea"),
        "indented": lambda t: json.dumps(json.loads(t), indent=1),
    }
    for slug, edit in spelled.items():
        yield refused(f"manifest-spelled-{slug}", "E203 E202", "3.2", build(SIMPLE, text=edit))
    for slug, value in (
        ("high", "\\ud800"),
        ("low", "\\udc00"),
        ("reversed", "\\udc00\\ud800"),
        ("in-key", '\\ud800":"x","z'),
    ):
        edit = replaced(TEXT, value) if slug != "in-key" else replaced('"text":', '"\\ud800":')
        yield refused(f"manifest-lone-surrogate-{slug}", "E203 E202 E205", "3.2", build(SIMPLE, text=edit))
    pair = simple(metadata={"\ufb33": "1", "\U0001f600": "2"})
    by_code_point = replaced('"\U0001f600":"2","\ufb33":"1"', '"\ufb33":"1","\U0001f600":"2"')
    yield refused("manifest-code-point-order", "E203", "3.2", build(pair, text=by_code_point))


def features() -> Iterator[Entry]:
    """SPEC 3.3."""
    for slug, names in (
        ("unknown", ["x-conformance"]),
        ("two-unknown", ["x-a", "x-b"]),
        ("empty-name", [""]),
        ("version", ["1.0"]),
        ("reserved", ["shards"]),
    ):
        yield refused(f"feature-{slug}", "E204", "3.3", build(SIMPLE, manifest=put("features", to=names)))
    for slug, names in (("not-sorted", ["x-b", "x-a"]), ("twice", ["x-a", "x-a"])):
        yield refused(f"feature-{slug}", "E204 E205", "3.3", build(SIMPLE, manifest=put("features", to=names)))
    yield refused("feature-number", "E205 E204", "3.4", build(SIMPLE, manifest=put("features", to=[1])))
    for slug, value in (("text", "x"), ("null", None), ("object", {})):
        yield refused(f"features-{slug}", "E205", "3.4", build(SIMPLE, manifest=put("features", to=value)))


def schema(where: str, slug: str, edit: Any) -> Entry:
    return refused(f"schema-{where}-{slug}", "E205", "3.4", build(WHOLE, digested=edit))


def schema_of(content: Content, slug: str, edit: Any) -> Entry:
    return refused(f"schema-{slug}", "E205", "3.4", build(content, digested=edit))


def compact() -> Iterator[Entry]:
    """SPEC 3.4: usual values of a module, pairs of axis and exponent, and the table of digests."""
    norm, matrix = ("modules", 1), ("modules", 0)
    plain = simple()
    written: dict[str, Any] = {
        "dtype-bf16": put(*norm, "dtype", to="BF16"),
        "encoding-sign": put(*norm, "encoding", to="sign"),
        "encoding-sign-and-components": put(*matrix, "encoding", to="sign"),
        "components-and-encoding": put(*norm, "components", to=[["row", 0]]),
        "components-none-and-encoding": put(*norm, "components", to=[]),
        "components-null": put(*matrix, "components", to=None),
        "encoding-null": put(*matrix, "encoding", to=None),
        "no-encoding": removed(*norm, "encoding"),
        "base-as-usual": put(*matrix, "base", to={"dtype": "BF16", "shape": [3, 11]}),
        "base-with-sha256": put(*matrix, "base", to={"dtype": "BF16", "sha256": "ab" * 32, "shape": [2, 11]}),
        "sha256": put(*norm, "sha256", to="ab" * 32),
    }
    for slug, edit in written.items():
        yield schema_of(plain, f"module-{slug}", edit)
    parts = {
        "object": {"axis": "row", "exponent": -3},
        "one": ["row"],
        "three": ["row", -3, 0],
        "reversed": [-3, "row"],
        "text": "row",
        "flat": "row,-3",
        "empty": [],
        "null": None,
    }
    for slug, part in parts.items():
        yield schema_of(plain, f"component-{slug}", put(*matrix, "components", 0, to=part))
    yield schema_of(plain, "components-flat", put(*matrix, "components", to=["row", -3]))
    # 64 bytes: the last of 86 characters holds two bits, and four that are 0.
    two = Content(modules=(full("a", (1,)), full("b", (1,))))
    good = manifest_table(two)
    tables = {
        "padded": good + "=",
        "spaces": good[:40] + " " + good[40:],
        "newline": good + "\n",
        "url-alphabet": good[:-1] + "-",
        "unused-bits": good[:-1] + chr(ord(good[-1]) + 1),
        "one-more-character": good + "A",
        "a-byte-short": good[:-2],
        "31-bytes": "A" * 42,
        "33-bytes": "A" * 44,
        "hex": "ab" * 96,
        "accent": good[:-1] + "\u00e9",
        "array": [good],
        "object": {"0": good},
    }
    for slug, text in tables.items():
        yield schema_of(two, f"digests-{slug}", put("digests", to=text))


def manifest_table(content: Content) -> str:
    """The table of digests of a file."""
    return str(json.loads(manifest_text(build(content)))["digests"])


def counts() -> Iterator[Entry]:
    """SPEC 3.13: the number of digests by modules and bases."""
    kept = Content(modules=(same("w", (3, 4)), full("v", (2,)), same("t", (5, 2), base_rows=4)))
    for name, content in (("simple", simple()), ("kept", kept)):
        digests = untabled(manifest_table(content))
        for slug, held in (
            ("none", []),
            ("one", digests[:1]),
            ("one-less", digests[:-1]),
            ("one-more", [*digests, "ab" * 32]),
            ("twice", digests * 2),
            ("first-twice", [digests[0], *digests]),
        ):
            file = build(content, manifest=put("digests", to=table(held)))
            yield refused(f"digests-{name}-{slug}", "E213 E210", "3.13", file)


def schemas() -> Iterator[Entry]:
    """SPEC 3.4 and 3.7."""
    for where, path in PATHS.items():
        yield schema(where, "unknown-key", put(*path, "zzz", to=None))
        for key in KEYS[where].split():
            yield schema(where, f"no-{key.replace('_', '-')}", removed(*path, key))
        if path:
            yield schema(where, "is-text", put(*path, to="x"))
            yield schema(where, "is-array", put(*path, to=[]))
    for where in ("base", "fine-tuned", "producer", "asset", "module"):
        yield schema(where, "is-null", put(*PATHS[where], to=None))
    for key in ("assets", "dropped", "metadata", "modules", "tied"):
        yield schema("top", f"{key}-null", put(key, to=None))
        yield schema("top", f"{key}-text", put(key, to="x"))
    yield from schema_texts()
    yield from schema_digests()
    yield from schema_values()


def schema_texts() -> Iterator[Entry]:
    """SPEC 3.4: texts, and words of a list."""
    texts: dict[str, tuple[Any, ...]] = {
        "base-id": ("base", "id"),
        "fine-tuned-id": ("fine_tuned", "id"),
        "producer-name": ("producer", "name"),
        "source": ("calibration", "source"),
        "asset-path": ("assets", 0, "path"),
        "module-name": ("modules", 1, "name"),
        "encoding": ("modules", 1, "encoding"),
        "dtype": ("modules", 1, "dtype"),
        "axis": ("modules", 0, "components", 0, 0),
        "base-dtype": ("modules", 0, "base", "dtype"),
        "digests": ("digests",),
    }
    for slug, path in texts.items():
        yield schema(slug, "null", put(*path, to=None))
        yield schema(slug, "number", put(*path, to=1))
    for slug, path in (("base-revision", ("base", "revision")), ("fine-tuned-revision", ("fine_tuned", "revision"))):
        yield schema(slug, "number", put(*path, to=1))
        yield schema(slug, "false", put(*path, to=False))
    words = {
        "encoding-upper": ("modules", 1, "encoding"),
        "dtype": ("modules", 1, "dtype"),
        "axis": ("modules", 0, "components", 0, 0),
        "module-base-dtype": ("modules", 0, "base", "dtype"),
    }
    for slug, path in words.items():
        for value in ("", "SIGN", "Row", "bf16", "none", "col+row"):
            if (
                value in ("", "none")
                or {"SIGN": "encoding", "Row": "axis", "bf16": "dtype", "col+row": "axis"}[value] in slug
            ):
                yield schema(slug, f"word-{value or 'empty'}".lower().replace("+", "-"), put(*path, to=value))


def schema_digests() -> Iterator[Entry]:
    """SPEC 3.4: hex digests, with and without their algorithm."""
    value: Any
    good = "ab" * 32
    digests = {
        "upper": good.upper(),
        "short": good[:-1],
        "long": good + "a",
        "not-hex": "g" * 64,
        "empty": "",
        "prefixed": f"sha256:{good}",
        "newline": good + "\n",
        "null": None,
    }
    for slug, value in digests.items():
        yield schema("asset-sha256", slug, put("assets", 0, "sha256", to=value))
    for slug, value in (
        ("bare", good),
        ("upper", "sha256:" + good.upper()),
        ("other", "sha512:" + good),
        ("case", "SHA256:" + good),
        ("short", "sha256:" + good[1:]),
        ("null", None),
    ):
        yield schema("calibration-digest", slug, put("calibration", "digest", to=value))
        yield schema("base-digest", slug, put("base", "digest", to=value))


def schema_values() -> Iterator[Entry]:
    """SPEC 3.4: integers, shapes, lists of names."""
    value: Any
    for key in ("samples", "seed", "sequence_length"):
        for slug, value in (("negative", -1), ("true", True), ("text", "1"), ("null", None)):
            yield schema(f"calibration-{key.replace('_', '-')}", slug, put("calibration", key, to=value))
    for slug, value in (("text", "0"), ("null", None), ("true", True), ("array", [0])):
        yield schema("exponent", slug, put("modules", 0, "components", 0, 1, to=value))
    yield from compact()
    for slug, value in (
        ("text", "[7,9]"),
        ("null", None),
        ("object", {"0": 7, "1": 9}),
        ("true", [7, 9, True]),
        ("of-text", ["7", "9"]),
        ("negative", [-7, -9]),
    ):
        yield schema("shape", slug, put("modules", 0, "shape", to=value))
    yield schema("module-base-shape", "true", put("modules", 0, "base", "shape", to=[5, 9, True]))
    for slug, value in (("number", 1), ("null", None), ("object", {}), ("array", []), ("true", True)):
        yield schema("metadata-value", slug, put("metadata", "licence", to=value))
    for slug, value in (
        ("one", [["model.norm.weight"]]),
        ("three", [["model.norm.weight", "a", "b"]]),
        ("object", [{"model.norm.weight": "a"}]),
        ("number", [["model.norm.weight", 1]]),
    ):
        yield schema("tied", slug, put("tied", to=value))
    yield schema("dropped", "number", put("dropped", to=[1]))
    yield refused(
        "tied-not-sorted", "E205", "3.7", build(simple(tied=(("model.norm.weight", "b"), ("model.norm.weight", "a"))))
    )
    yield refused(
        "tied-sorted-by-module",
        "E205",
        "3.7",
        build(simple(tied=(("model.norm.weight", "z"), ("model.q_proj.weight", "a")))),
    )
    yield refused("dropped-not-sorted", "E205", "3.7", build(simple(dropped=("b", "a"))))
    yield refused("dropped-sorted-without-case", "E205", "3.7", build(simple(dropped=("a", "B"))))
    yield refused("dropped-twice", "E205 E207", "3.7", build(simple(dropped=("a", "a"))))


def manifest() -> Iterator[Entry]:
    """Every case of this module."""
    for group in (texts, features, schemas, counts):
        yield from group()
