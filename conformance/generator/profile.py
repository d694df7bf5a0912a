"""Files with one fault in the manifest or in the tensors that it asks for (SPEC 3 and 4)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from .build import base_digest, build, frame
from .content import Asset, Base, Content, Module, component, full, same, sign
from .entry import Entry, refused
from .faults import drop_tensor, put, record, removed, replaced, retensor, swapped
from .valid import simple

__all__ = ["profile"]

TEXT = "one line of text in the middle"
SIMPLE = simple(metadata={"text": TEXT})
WHOLE = Content(
    modules=(sign("model.embed_tokens.weight", (7, 9), base_rows=5), full("model.norm.weight", (9,))),
    assets=(Asset(path="config.json", data=b"{}"),),
    metadata={"licence": "Apache-2.0"},
    calibration={"digest": "sha256:" + "ab" * 32, "samples": 50, "seed": 0, "sequence_length": 128, "source": "wikitext"},
)
ONE = Content(modules=(full("w", (1,), dtype="U8"),))


def texts() -> Iterator[Entry]:
    """SPEC 3.1 and 3.2."""
    wrong = {
        "empty": lambda t: "", "word": lambda t: "manifest", "cut": lambda t: t[:-1], "twice": lambda t: t + t, "trailing-comma": lambda t: t[:-1] + ",}",
        "number": lambda t: "1", "null": lambda t: "null", "array": lambda t: f"[{t}]", "raw-control": replaced("line of", "line\tof"),
        "nan": replaced("[5]", "[NaN]"), "leading-zero": replaced("[5]", "[05]"), "bad-escape": replaced("line of", "line \\x41"), "single-quotes": replaced('"text"', "'text'"),
    }  # fmt: skip
    for slug, edit in wrong.items():
        yield refused(f"manifest-{slug}", "E202", "3.1", build(SIMPLE, text=edit))
    twice = {
        "top": replaced('"dropped":[]', '"dropped":[],"dropped":[]'), "module": replaced('"encoding":"sign"', '"encoding":"sign","encoding":"sign"'),
        "component": replaced('"axis":"row"', '"axis":"row","axis":"row"'), "module-base": replaced('"base":{"dtype":"BF16"', '"base":{"dtype":"BF16","dtype":"BF16"'),
        "base": replaced('"revision":"0123abcd"', '"revision":"0123abcd","revision":"0123abcd"'), "metadata": replaced('"text":', '"text":"","text":'),
        "producer": replaced('"version":"1"', '"version":"1","version":"1"'), "fine-tuned": replaced('"revision":null', '"revision":null,"revision":null'),
        "escaped": replaced('"text":', '"te\\u0078t":"","text":'),
    }  # fmt: skip
    for slug, edit in twice.items():
        yield refused(f"manifest-duplicate-{slug}", "E202", "3.1", build(SIMPLE, text=edit))
    numbers = {"point": "5.0", "exponent": "5e0", "2-53": "9007199254740992", "400-digits": "5" + "0" * 400, "negative-2-53": "-9007199254740992"}
    for slug, number in numbers.items():
        yield refused(f"manifest-number-{slug}", "E202", "3.1", build(SIMPLE, text=replaced("[5]", f"[{number}]")))
    for slug, value in (("9", "[" * 7 + "]" * 7), ("1000", "[" * 1000 + "]" * 1000)):
        yield refused(f"manifest-depth-{slug}", "E202", "3.1", build(SIMPLE, text=replaced(f'"{TEXT}"', value)))
    spelled = {
        "space-first": lambda t: " " + t, "space-last": lambda t: t + " ", "newline": lambda t: t + "\n", "space-inside": replaced('"dropped":[]', '"dropped": []'),
        "key-order": lambda t: '{"tied":[],' + t[1:].replace(',"tied":[]', ""), "module-key-order": replaced('"dtype":"BF16","encoding":"sign"', '"encoding":"sign","dtype":"BF16"'),
        "escape": replaced("line of", "\\u006cine of"), "slash": replaced("line of", "line\\/of"), "minus-zero": replaced('"exponent":-3', '"exponent":-0'),
        "escape-case": lambda t: t.replace(TEXT, "\\u001F"), "long-escape": replaced(TEXT, "\\u000a"), "escape-delete": replaced(TEXT, "\\u007f"),
        "escape-accent": replaced(TEXT, "\\u00e9"), "escape-emoji": replaced(TEXT, "\\ud83e\\uddea"), "indented": lambda t: json.dumps(json.loads(t), indent=1),
    }  # fmt: skip
    for slug, edit in spelled.items():
        yield refused(f"manifest-spelled-{slug}", "E203 E202", "3.2", build(SIMPLE, text=edit))
    for slug, value in (("high", "\\ud800"), ("low", "\\udc00"), ("reversed", "\\udc00\\ud800"), ("in-key", "\\ud800\":\"x\",\"z")):
        edit = replaced(TEXT, value) if slug != "in-key" else replaced('"text":', '"\\ud800":')
        yield refused(f"manifest-lone-surrogate-{slug}", "E203 E202 E205", "3.2", build(SIMPLE, text=edit))
    pair = simple(metadata={"\ufb33": "1", "\U0001f600": "2"})
    by_code_point = replaced('"\U0001f600":"2","\ufb33":"1"', '"\ufb33":"1","\U0001f600":"2"')
    yield refused("manifest-code-point-order", "E203", "3.2", build(pair, text=by_code_point))


def features() -> Iterator[Entry]:
    """SPEC 3.3."""
    for slug, names in (("unknown", ["x-conformance"]), ("two-unknown", ["x-a", "x-b"]), ("empty-name", [""]), ("version", ["1.0"]), ("reserved", ["shards"])):
        yield refused(f"feature-{slug}", "E204", "3.3", build(SIMPLE, manifest=put("features", to=names)))
    for slug, names in (("not-sorted", ["x-b", "x-a"]), ("twice", ["x-a", "x-a"])):
        yield refused(f"feature-{slug}", "E204 E205", "3.3", build(SIMPLE, manifest=put("features", to=names)))
    yield refused("feature-number", "E205 E204", "3.4", build(SIMPLE, manifest=put("features", to=[1])))
    for slug, value in (("text", "x"), ("null", None), ("object", {})):
        yield refused(f"features-{slug}", "E205", "3.4", build(SIMPLE, manifest=put("features", to=value)))


PATHS: dict[str, tuple[Any, ...]] = {
    "top": (), "base": ("base",), "calibration": ("calibration",), "fine-tuned": ("fine_tuned",), "producer": ("producer",), "asset": ("assets", 0),
    "module": ("modules", 0), "module-base": ("modules", 0, "base"), "component": ("modules", 0, "components", 0),
}  # fmt: skip
KEYS = {
    "top": "assets base calibration dropped features fine_tuned metadata modules producer tied", "base": "digest id revision",
    "calibration": "digest samples seed sequence_length source", "fine-tuned": "id revision", "producer": "name version", "asset": "path sha256",
    "module": "base components dtype encoding name sha256 shape", "module-base": "dtype sha256 shape", "component": "axis exponent",
}  # fmt: skip


def schema(where: str, slug: str, edit: Any) -> Entry:
    return refused(f"schema-{where}-{slug}", "E205", "3.4", build(WHOLE, digested=edit))


def schemas() -> Iterator[Entry]:
    """SPEC 3.4 and 3.7."""
    for where, path in PATHS.items():
        yield schema(where, "unknown-key", put(*path, "zzz", to=None))
        for key in KEYS[where].split():
            yield schema(where, f"no-{key.replace('_', '-')}", removed(*path, key))
        if path:
            yield schema(where, "is-text", put(*path, to="x"))
            yield schema(where, "is-array", put(*path, to=[]))
    for where in ("base", "fine-tuned", "producer", "asset", "module", "component"):
        yield schema(where, "is-null", put(*PATHS[where], to=None))
    for key in ("assets", "dropped", "metadata", "modules", "tied"):
        yield schema("top", f"{key}-null", put(key, to=None))
        yield schema("top", f"{key}-text", put(key, to="x"))
    texts = {"base-id": ("base", "id"), "fine-tuned-id": ("fine_tuned", "id"), "producer-name": ("producer", "name"), "source": ("calibration", "source"),
             "asset-path": ("assets", 0, "path"), "module-name": ("modules", 1, "name"), "encoding": ("modules", 1, "encoding"), "dtype": ("modules", 1, "dtype"),
             "axis": ("modules", 0, "components", 0, "axis"), "base-dtype": ("modules", 0, "base", "dtype")}  # fmt: skip
    for slug, path in texts.items():
        yield schema(slug, "null", put(*path, to=None))
        yield schema(slug, "number", put(*path, to=1))
    for slug, path in (("base-revision", ("base", "revision")), ("fine-tuned-revision", ("fine_tuned", "revision"))):
        yield schema(slug, "number", put(*path, to=1))
        yield schema(slug, "false", put(*path, to=False))
    words = {"encoding-upper": ("modules", 1, "encoding"), "dtype": ("modules", 1, "dtype"), "axis": ("modules", 0, "components", 0, "axis"), "module-base-dtype": ("modules", 0, "base", "dtype")}
    for slug, path in words.items():
        for value in ("", "SIGN", "Row", "bf16", "none", "col+row"):
            if value in ("", "none") or {"SIGN": "encoding", "Row": "axis", "bf16": "dtype", "col+row": "axis"}[value] in slug:
                yield schema(slug, f"word-{value or 'empty'}".lower().replace("+", "-"), put(*path, to=value))
    good = "ab" * 32
    digests = {"upper": good.upper(), "short": good[:-1], "long": good + "a", "not-hex": "g" * 64, "empty": "", "prefixed": f"sha256:{good}", "newline": good + "\n", "null": None}
    for slug, value in digests.items():
        yield schema("asset-sha256", slug, put("assets", 0, "sha256", to=value))
        yield schema("module-base-sha256", slug, put("modules", 0, "base", "sha256", to=value))
        if value is not None:
            yield schema("module-sha256", slug, put("modules", 0, "sha256", to=value))
    for slug, value in (("bare", good), ("upper", "sha256:" + good.upper()), ("other", "sha512:" + good), ("case", "SHA256:" + good), ("short", "sha256:" + good[1:]), ("null", None)):
        yield schema("calibration-digest", slug, put("calibration", "digest", to=value))
        yield schema("base-digest", slug, put("base", "digest", to=value))
    for key in ("samples", "seed", "sequence_length"):
        for slug, value in (("negative", -1), ("true", True), ("text", "1"), ("null", None)):
            yield schema(f"calibration-{key.replace('_', '-')}", slug, put("calibration", key, to=value))
    for slug, value in (("text", "0"), ("null", None), ("true", True), ("array", [0])):
        yield schema("exponent", slug, put("modules", 0, "components", 0, "exponent", to=value))
    for slug, value in (("text", "[7,9]"), ("null", None), ("object", {"0": 7, "1": 9}), ("true", [7, 9, True]), ("of-text", ["7", "9"]), ("negative", [-7, -9])):
        yield schema("shape", slug, put("modules", 0, "shape", to=value))
    yield schema("module-base-shape", "true", put("modules", 0, "base", "shape", to=[5, 9, True]))
    for slug, value in (("number", 1), ("null", None), ("object", {}), ("array", []), ("true", True)):
        yield schema("metadata-value", slug, put("metadata", "licence", to=value))
    for slug, value in (("one", [["model.norm.weight"]]), ("three", [["model.norm.weight", "a", "b"]]), ("object", [{"model.norm.weight": "a"}]), ("number", [["model.norm.weight", 1]])):
        yield schema("tied", slug, put("tied", to=value))
    yield schema("dropped", "number", put("dropped", to=[1]))
    yield refused("tied-not-sorted", "E205", "3.7", build(simple(tied=(("model.norm.weight", "b"), ("model.norm.weight", "a")))))
    yield refused("tied-sorted-by-module", "E205", "3.7", build(simple(tied=(("model.norm.weight", "z"), ("model.q_proj.weight", "a")))))
    yield refused("dropped-not-sorted", "E205", "3.7", build(simple(dropped=("b", "a"))))
    yield refused("dropped-sorted-without-case", "E205", "3.7", build(simple(dropped=("a", "B"))))
    yield refused("dropped-twice", "E205 E207", "3.7", build(simple(dropped=("a", "a"))))


def names() -> Iterator[Entry]:
    """SPEC 3.5 and 3.6."""
    wrong = {"empty": "", "513": "n" * 513, "space": "a b", "slash": "a/b", "backslash": "a\\b", "delete": "a\x7f", "newline": "a\n", "nul": "a\0b",
             "accent": "caf\u00e9", "ansi": "\x1b[31mred", "bidi": "a\u202eb", "parent": "../a", "full-width": "\uff41"}  # fmt: skip
    for slug, name in wrong.items():
        yield refused(f"name-{slug}", "E206", "3.5", build(Content(modules=(full(name, (1,), dtype="U8"),))))
        yield refused(f"name-alias-{slug}", "E206", "3.5", build(simple(tied=(("model.norm.weight", name),))))
        yield refused(f"name-dropped-{slug}", "E206", "3.5", build(simple(dropped=(name,))))
    for slug, name in (("reserved", "__weight"), ("of-pad", "__pad__.0"), ("of-metadata", "__metadata__"), ("of-asset", "__asset__.0")):
        yield refused(f"name-{slug}", "E206", "3.5", build(Content(modules=(full(name, (1,), dtype="U8"),))))
        yield refused(f"name-alias-{slug}", "E206", "3.5", build(simple(tied=(("model.norm.weight", name),))))
    yield refused("name-dropped-reserved", "E206", "3.5", build(simple(dropped=("__weight",))))
    twice = Content(modules=(same("w", (3,)), same("v", (3,)), same("w", (3,))))
    yield refused("name-twice", "E207", "3.6", build(twice))
    norm, query = "model.norm.weight", "model.q_proj.weight"
    tied = {
        "alias-is-module": ((norm, query),), "alias-is-itself": ((norm, norm),), "alias-twice": ((norm, "a"), (query, "a")), "alias-pair-twice": ((norm, "a"), (norm, "a")),
        "of-no-module": (("model.none", "a"),), "of-an-alias": ((norm, "a"), ("a", "b")), "other-case": (("model.norm.Weight", "a"),),
    }  # fmt: skip
    for slug, pairs in tied.items():
        yield refused(f"tied-{slug}", "E207", "3.6", build(simple(tied=pairs)))
    yield refused("dropped-is-module", "E207", "3.6", build(simple(dropped=(norm,))))
    yield refused("dropped-is-alias", "E207", "3.6", build(simple(tied=((norm, "a"),), dropped=("a",))))


def limits() -> Iterator[Entry]:
    """SPEC 3.8."""
    yield refused("no-modules", "E208", "3.8", build(Content(modules=())))
    nine = tuple(component(f"c{k}", (2, 8), "tensor") for k in range(9))
    yield refused("nine-components", "E208 E209", "3.8", build(Content(modules=(sign("w", (2, 8), components=nine),))))
    yield refused("nine-dimensions", "E208", "3.8", build(Content(modules=(same("w", (1,) * 9, base=b"12"),))))
    yield refused("dimension-zero", "E208", "3.8", build(Content(modules=(same("w", (3, 0), base=b""),))))
    far = Base(dtype="U8", shape=(1,) * 9, data=b"1")
    yield refused("base-nine-dimensions", "E208 E209", "3.8", build(Content(modules=(full("w", (2,), base=far),))))
    none = Base(dtype="U8", shape=(0,), data=b"")
    yield refused("base-dimension-zero", "E208 E209", "3.8", build(Content(modules=(full("w", (2,), base=none),))))


def encodings() -> Iterator[Entry]:
    """SPEC 3.9 to 3.11."""

    def fits(slug: str, modules: tuple[Module, ...], clause: str = "3.9", **hooks: Any) -> Entry:
        return refused(f"fit-{slug}", "E209", clause, build(Content(modules=modules), **hooks))

    digest = "ab" * 32
    here = ("modules", 0)
    whole = sign("w", (3, 9))
    yield fits("sign-no-components", (sign("w", (3, 9), components=()),), manifest=put(*here, "sha256", to=digest))
    for dtype in ("I8", "F64", "F8_E4M3", "BOOL"):
        yield fits(f"sign-of-{dtype.lower().replace('_', '-')}", (sign("w", (3, 9), dtype=dtype, base_dtype="BF16"),))
        yield fits(f"sign-on-{dtype.lower().replace('_', '-')}", (sign("w", (3, 9), base_dtype=dtype),))
    yield fits("sign-no-base", (dataclasses.replace(whole, base=None),))
    yield fits("sign-one-dimension", (sign("w", (9,), components=(component("c", (1, 9), "tensor"),)),),
               tensors=lambda t: [dataclasses.replace(t[0], shape=(2,)), *t[1:]])  # fmt: skip
    yield fits("sign-no-sha256", (whole,), manifest=put(*here, "sha256", to=None))
    yield fits("full-components", (full("w", (3,)),), manifest=put(*here, "components", to=[{"axis": "row", "exponent": 0}]))
    yield fits("full-no-sha256", (full("w", (3,)),), manifest=put(*here, "sha256", to=None))
    yield fits("same-components", (same("w", (3, 9)),), manifest=put(*here, "components", to=[{"axis": "row", "exponent": 0}]))
    yield fits("same-no-base", (dataclasses.replace(same("w", (3,)), base=None),))
    yield fits("same-sha256", (same("w", (3,)),), manifest=put(*here, "sha256", to=digest))
    yield fits("same-tail-no-sha256", (same("w", (3,), base_rows=2),), manifest=put(*here, "sha256", to=None))
    for dtype, base in (("I16", "U16"), ("F32", "I32"), ("F32", "F64"), ("F64", "F32"), ("U8", "BOOL"), ("F8_E4M3", "F8_E5M2"), ("BF16", "F8_E4M3")):
        slug = f"same-{dtype}-on-{base}".lower().replace("_", "-")
        yield fits(slug, (same("w", (3,), dtype=dtype, base_dtype=base),))
    for exponent in (-65, 64, 127, 2**53 - 1, -(2**53) + 1):
        yield fits(f"exponent-{exponent}", (sign("w", (3, 9), exponent=exponent),))
    shapes = {"columns": (3, 8), "rank": (3, 9, 1), "fewer-dimensions": (27,), "transposed": (9, 3), "none": ()}
    for slug, shape in shapes.items():
        count = 54 if shape else 2
        other = Base(dtype="BF16", shape=shape, data=bytes(count))
        held = dataclasses.replace(whole, base=other)
        if slug in ("columns", "rank", "none"):
            yield fits(f"sign-base-{slug}", (held,), "3.10")
        plain = dataclasses.replace(same("w", (3, 9)), base=other)
        if shape != (9, 3) and shape != (27,):
            yield fits(f"same-base-{slug}", (plain,), "3.10")
    yield fits("same-base-transposed", (dataclasses.replace(same("w", (3, 9)), base=Base(dtype="BF16", shape=(9, 3), data=bytes(54))),), "3.10")
    yield fits("same-batch-differs", (dataclasses.replace(same("w", (2, 3, 4)), base=Base(dtype="BF16", shape=(2, 2, 4), data=bytes(32))),), "3.10")
    yield fits("same-no-dimensions-on-one", (dataclasses.replace(same("w", (), dtype="I64"), base=Base(dtype="I64", shape=(1,), data=bytes(8))),), "3.10")
    unsorted = Content(modules=(same("z", (2,)), sign("b", (2, 9)), full("a", (2,), base=Base(dtype="BF16", shape=(2,), data=b"1234")), full("n", (1,))))

    def digest_as(slug: str, change: Any) -> Entry:
        def edit(manifest: dict[str, Any]) -> dict[str, Any]:
            return put("base", "digest", to=base_digest(change(manifest["modules"])))(manifest)

        return refused(f"base-digest-{slug}", "E210", "3.11", build(unsorted, manifest=edit))

    yield digest_as("of-nothing", lambda modules: [])
    yield digest_as("without-full", lambda modules: [m for m in modules if m["encoding"] != "full"])
    yield digest_as("of-fine-tuned-names", lambda modules: [{**m, "name": m["name"] + "x"} for m in modules])
    yield digest_as("of-one-other", lambda modules: [{**m, "base": m["base"] and {**m["base"], "sha256": digest}} for m in modules])
    yield refused("base-digest-zeros", "E210", "3.11", build(unsorted, manifest=put("base", "digest", to="sha256:" + "0" * 64)))
    in_order = json.dumps([[m.name, m.base.dtype, list(m.base.shape), described(m.base)["sha256"]] for m in unsorted.modules if m.base], separators=(",", ":"))
    yield refused("base-digest-not-sorted", "E210", "3.11", build(unsorted, manifest=put("base", "digest", to="sha256:" + hexdigest(in_order))))


def hexdigest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def described(base: Base) -> dict[str, Any]:
    return {"dtype": base.dtype, "shape": list(base.shape), "sha256": hashlib.sha256(base.data).hexdigest()}


def assets() -> Iterator[Entry]:
    """SPEC 3.12."""
    wrong = {
        "parent": "../config.json", "folder": "a/config.json", "backslash": "a\\config.json", "absolute": "/config.json", "python": "modeling.py", "pickle": "model.bin",
        "weights": "model.safetensors", "index": "model.safetensors.index.json", "index-short": "a.index.json", "hidden": ".config.json", "only-suffix": ".json", "upper-suffix": "config.JSON",
        "121-characters": "x" * 120 + ".json", "newline": "config.json\n", "nul": "config.json\0", "nul-inside": "a\0.json", "accent": "caf\u00e9.json", "empty": "", "no-suffix": "config",
        "dash": "-rf.json", "space": "a b.json", "space-last": "config.json ", "colon": "c:a.json", "two-lines": "a\n.json", "digit-not-ascii": "\u0665.json", "yaml": "config.yaml",
    }  # fmt: skip
    for slug, path in wrong.items():
        yield refused(f"asset-path-{slug}", "E211", "3.12", build(simple(assets=(Asset(path=path, data=b"{}"),))))
    for slug, paths in (("same", ("a.json", "a.json")), ("other-case", ("README.md", "readme.md")), ("three", ("a.json", "b.json", "A.json"))):
        held = tuple(Asset(path=path, data=b"{}") for path in paths)
        yield refused(f"asset-twice-{slug}", "E211", "3.12", build(simple(assets=held)))


def tensors() -> Iterator[Entry]:
    """SPEC 4.1 and 4.2. The tensors of SIMPLE: mask, pad, row, pad, full."""
    rich = Content(modules=(sign("w", (3, 3), ("row+col",), base_rows=2), full("v", (2,), dtype="U8"), sign("s", (8, 8), ("row",))),
                   assets=(Asset(path="a.json", data=b"{}"), Asset(path="b.json", data=b"[]")))  # fmt: skip
    square = Content(modules=(sign("w", (8, 8), ("row",)),))
    wrong = {
        "missing-last": (SIMPLE, {"tensors": lambda t: t[:-2], "digested": put("modules", 1, "sha256", to="ab" * 32)}), "extra-last": (SIMPLE, {"tensors": lambda t: [*t, dataclasses.replace(t[3], name="__pad__.2", shape=(54,), data=bytes(54)), dataclasses.replace(t[4], name="extra", owner=("other", 0))]}),
        "pad-last": (SIMPLE, {"tensors": lambda t: [*t, dataclasses.replace(t[3], name="__pad__.2", shape=(54,), data=bytes(54))]}),
        "mask-name": (SIMPLE, {"tensors": retensor(0, name="model.q_proj.weight.0.signs")}), "mask-index": (SIMPLE, {"tensors": retensor(0, name="model.q_proj.weight.1.mask")}),
        "module-name": (SIMPLE, {"tensors": retensor(4, name="model.norm.weigh.full")}), "name-case": (SIMPLE, {"tensors": retensor(4, name="model.norm.weight.FULL")}),
        "mask-signed": (SIMPLE, {"tensors": retensor(0, dtype="I8")}), "scale-bf16": (SIMPLE, {"tensors": retensor(2, dtype="BF16")}), "scale-u16": (SIMPLE, {"tensors": retensor(2, dtype="U16")}),
        "mask-flat": (SIMPLE, {"tensors": retensor(0, shape=(6,))}), "mask-transposed": (SIMPLE, {"tensors": retensor(0, shape=(2, 3))}), "scale-two-dimensions": (SIMPLE, {"tensors": retensor(2, shape=(3, 1))}),
        "full-flat": (Content(modules=(full("w", (2, 3)),)), {"tensors": retensor(0, shape=(6,))}), "full-dtype": (SIMPLE, {"tensors": retensor(4, dtype="F16")}), "full-bytes": (SIMPLE, {"tensors": retensor(4, dtype="U8", shape=(10,))}),
        "scale-of-other-axis": (square, {"tensors": retensor(1, name="w.0.col")}), "axis-of-other-scale": (square, {"manifest": put("modules", 0, "components", 0, "axis", to="col")}),
        "no-scale": (square, {"tensors": drop_tensor(-1)}), "scales-swapped": (rich, {"tensors": swapped(2, 4)}), "no-tail": (Content(modules=(same("w", (3,), base_rows=2), full("v", (1,)))), {"tensors": lambda t: [dataclasses.replace(t[0], name="w.full"), *t[1:]]}),
        "row-col-without-col": (Content(modules=(sign("w", (8, 8), ("row+col",)),)), {"tensors": lambda t: t[:2]}),
        "module-order": (SIMPLE, {"manifest": lambda m: {**m, "modules": m["modules"][::-1]}}), "component-order": (Content(modules=(sign("w", (8, 8), ("row", "col")),)), {"manifest": put("modules", 0, "components", to=[{"axis": "col", "exponent": 0}, {"axis": "row", "exponent": 0}])}),
        "asset-missing": (rich, {"manifest": lambda m: {**m, "assets": [*m["assets"], {"path": "c.json", "sha256": "ab" * 32}]}}), "asset-extra": (rich, {"manifest": lambda m: {**m, "assets": m["assets"][:1]}}),
        "asset-shape": (rich, {"tensors": lambda t: [*t[:-1], dataclasses.replace(t[-1], shape=(1, 2))]}), "asset-dtype": (rich, {"tensors": lambda t: [*t[:-1], dataclasses.replace(t[-1], dtype="I8")]}), "asset-name": (rich, {"tensors": lambda t: [*t[:-1], dataclasses.replace(t[-1], name="__asset__.2")]}),
        "asset-by-path": (rich, {"tensors": lambda t: [*t[:-1], dataclasses.replace(t[-1], name="__asset__.b.json")]}), "asset-first": (Content(modules=(full("v", (64,), dtype="U8"),), assets=(Asset(path="a.json", data=b"{" + b" " * 62 + b"}"),)), {"tensors": swapped(0, 1)}),
    }  # fmt: skip
    for slug, (content, hooks) in wrong.items():
        yield refused(f"tensors-{slug}", "E212", "4.1", build(content, **hooks))
    two_pads = Content(modules=(sign("w", (8, 8), ("row",)), full("v", (64,), dtype="U8"), full("u", (1,), dtype="U8")))
    pads = {
        "missing": (SIMPLE, {"tensors": drop_tensor(1)}), "all-missing": (SIMPLE, {"tensors": lambda t: [x for x in t if x.owner[0] != "pad"]}),
        "name": (SIMPLE, {"tensors": retensor(1, name="__padding__.0")}), "index": (SIMPLE, {"tensors": retensor(1, name="__pad__.7")}), "index-restarts": (SIMPLE, {"tensors": lambda t: [x if x.name != "__pad__.1" else dataclasses.replace(x, name="__pad__.00") for x in t]}),
        "zero-filled-index": (SIMPLE, {"tensors": retensor(1, name="__pad__.00")}), "longer": (SIMPLE, {"tensors": retensor(1, shape=(122,), data=bytes(122))}), "of-16": (SIMPLE, {"tensors": retensor(1, shape=(10,), data=bytes(10))}),
        "two-for-one": (SIMPLE, {"tensors": lambda t: [t[0], dataclasses.replace(t[1], shape=(8,), data=bytes(8)), dataclasses.replace(t[1], name="__pad__.1", shape=(50,), data=bytes(50)), t[2], dataclasses.replace(t[3], name="__pad__.2"), t[4]]}),
        "not-needed": (two_pads, {"tensors": lambda t: [*t[:5], dataclasses.replace(t[1], name="__pad__.2", shape=(64,), data=bytes(64)), t[5]]}),
        "shape": (SIMPLE, {"tensors": retensor(1, shape=(29, 2))}), "dtype": (SIMPLE, {"tensors": retensor(1, dtype="I8")}), "first": (SIMPLE, {"tensors": lambda t: [dataclasses.replace(t[1], shape=(64,), data=bytes(64)), t[0], dataclasses.replace(t[1], name="__pad__.1"), t[2], dataclasses.replace(t[3], name="__pad__.2"), t[4]]}),
    }  # fmt: skip
    for slug, (content, hooks) in pads.items():
        yield refused(f"pad-{slug}", "E212", "4.2", build(content, **hooks))
    yield refused("only-metadata", "E212", "4.1", build(ONE, tensors=lambda t: [], manifest=put("modules", 0, "sha256", to="ab" * 32)))


def orders() -> Iterator[Entry]:
    """SPEC 8: two faults, and the step that comes first wins."""
    unknown = put("features", to=["x-conformance"])
    yield refused("order-container-before-profile", "E124", "2.18", build(SIMPLE, manifest=unknown, file=lambda f: f[:-1]))
    yield refused("order-duplicate-before-manifest", "E115", "2.9", build(SIMPLE, manifest=unknown, header=replaced('"dtype":"U8",', '"dtype":"U8","dtype":"U8",')))
    yield refused("order-version-before-json", "E201", "2.6", frame(b'{"__metadata__":{"format":"pxd","pxd":"9.9"', b""))
    yield refused("order-length-before-version", "E111", "2.4", build(SIMPLE, version="2.0", file=lambda f: (8184).to_bytes(8, "little") + f[8:4096]))
    yield refused("order-canonical-before-features", "E203", "3.2", build(SIMPLE, manifest=unknown, text=lambda t: t + " "))
    yield refused("order-features-before-schema", "E204", "3.3", build(SIMPLE, manifest=lambda m: {**m, "features": ["x-conformance"], "later": {}}))
    yield refused("order-profile-before-payload", "E205", "3.4", build(SIMPLE, manifest=put("zzz", to=1), data=lambda d: b"\xff" + d[1:]))
    yield refused("order-record-before-manifest", "E119", "2.13", build(SIMPLE, manifest=unknown, records=record(-1, dtype="F8")))


def profile() -> Iterator[Entry]:
    """Every case of this module."""
    for group in (texts, features, schemas, names, limits, encodings, assets, tensors, orders):
        yield from group()
