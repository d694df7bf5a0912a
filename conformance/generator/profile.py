"""Files with one fault in what the manifest says, or in the tensors that it asks for (SPEC 3.5 to 4.2)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from .build import base_digest, build, frame
from .content import Asset, Base, Content, Module, component, full, same, sign
from .entry import Entry, refused
from .faults import drop_tensor, put, record, replaced, retensor, swapped
from .valid import simple

__all__ = ["profile"]

TEXT = "one line of text in the middle"
SIMPLE = simple(metadata={"text": TEXT})
WHOLE = Content(
    modules=(sign("model.embed_tokens.weight", (7, 9), base_rows=5), full("model.norm.weight", (9,))),
    assets=(Asset(path="config.json", data=b"{}"),),
    metadata={"licence": "Apache-2.0"},
    calibration={
        "digest": "sha256:" + "ab" * 32,
        "samples": 50,
        "seed": 0,
        "sequence_length": 128,
        "source": "wikitext",
    },
)
ONE = Content(modules=(full("w", (1,), dtype="U8"),))


def names() -> Iterator[Entry]:
    """SPEC 3.5 and 3.6."""
    wrong = {
        "empty": "",
        "513": "n" * 513,
        "space": "a b",
        "slash": "a/b",
        "backslash": "a\\b",
        "delete": "a\x7f",
        "newline": "a\n",
        "nul": "a\0b",
        "accent": "caf\u00e9",
        "ansi": "\x1b[31mred",
        "bidi": "a\u202eb",
        "parent": "../a",
        "full-width": "\uff41",
    }
    for slug, name in wrong.items():
        yield refused(f"name-{slug}", "E206", "3.5", build(Content(modules=(full(name, (1,), dtype="U8"),))))
        yield refused(f"name-alias-{slug}", "E206", "3.5", build(simple(tied=(("model.norm.weight", name),))))
        yield refused(f"name-dropped-{slug}", "E206", "3.5", build(simple(dropped=(name,))))
    for slug, name in (
        ("reserved", "__weight"),
        ("of-pad", "__pad__.0"),
        ("of-metadata", "__metadata__"),
        ("of-asset", "__asset__.0"),
    ):
        yield refused(f"name-{slug}", "E206", "3.5", build(Content(modules=(full(name, (1,), dtype="U8"),))))
        yield refused(f"name-alias-{slug}", "E206", "3.5", build(simple(tied=(("model.norm.weight", name),))))
    yield refused("name-dropped-reserved", "E206", "3.5", build(simple(dropped=("__weight",))))
    twice = Content(modules=(same("w", (3,)), same("v", (3,)), same("w", (3,))))
    yield refused("name-twice", "E207", "3.6", build(twice))
    norm, query = "model.norm.weight", "model.q_proj.weight"
    tied = {
        "alias-is-module": ((norm, query),),
        "alias-is-itself": ((norm, norm),),
        "alias-twice": ((norm, "a"), (query, "a")),
        "alias-pair-twice": ((norm, "a"), (norm, "a")),
        "of-no-module": (("model.none", "a"),),
        "of-an-alias": ((norm, "a"), ("a", "b")),
        "other-case": (("model.norm.Weight", "a"),),
    }
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
    for slug, dtype, shape in (
        ("2-53", "U8", [2**26, 2**27]),
        ("2-53-bytes", "BF16", [2**52]),
        ("wraps-to-0", "U8", [2**32, 2**32]),
        ("wraps-to-4", "U8", [2**33 + 2, 2**33 + 2]),
        ("eight-largest", "U8", [2**53 - 1] * 8),
    ):
        same_size = claiming({"encoding": "same", "dtype": dtype, "shape": shape, "sha256": None}, dtype, shape)
        yield refused(f"size-{slug}", "E208", "3.8", build(ONE, manifest=same_size), "of a module that is the base's")
    kept = {"encoding": "full", "dtype": "U8", "shape": [1], "sha256": hashlib.sha256(b"v").hexdigest()}
    held = Content(modules=(full("w", (1,), dtype="U8", exact=b"v"),))
    yield refused("size-of-base", "E208", "3.8", build(held, manifest=claiming(kept, "BF16", [2**52], replace=True)))
    long = "a text of " + "x" * 2**16
    for slug, path in (
        ("base-id", ("base", "id")),
        ("fine-tuned-revision", ("fine_tuned", "revision")),
        ("producer-name", ("producer", "name")),
        ("calibration-source", ("calibration", "source")),
    ):
        yield refused(f"long-{slug}", "E208", "3.8", build(WHOLE, manifest=put(*path, to=long)))
    yield refused(
        "record-name-1024",
        "E212",
        "4.1",
        build(ONE, records=record(0, name="n" * 1024)),
        "the longest name that the container takes (2.12)",
    )


def claiming(module: dict[str, Any], dtype: str, shape: list[int], *, replace: bool = False) -> Any:
    """Put a module `v` on a base tensor of this size beside the others, or in their place; the digest follows."""

    def edit(manifest: dict[str, Any]) -> dict[str, Any]:
        base = {"dtype": dtype, "shape": shape, "sha256": "0" * 64}
        name = manifest["modules"][0]["name"] if replace else "v"
        made = {"name": name, "components": [], "base": base, **module}
        return {**manifest, "modules": [made] if replace else [*manifest["modules"], made]}

    return edit


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
    yield fits(
        "sign-one-dimension",
        (sign("w", (9,), components=(component("c", (1, 9), "tensor"),)),),
        tensors=lambda t: [dataclasses.replace(t[0], shape=(2,)), *t[1:]],
    )
    yield fits("sign-no-sha256", (whole,), manifest=put(*here, "sha256", to=None))
    yield fits(
        "full-components", (full("w", (3,)),), manifest=put(*here, "components", to=[{"axis": "row", "exponent": 0}])
    )
    yield fits("full-no-sha256", (full("w", (3,)),), manifest=put(*here, "sha256", to=None))
    yield fits(
        "same-components", (same("w", (3, 9)),), manifest=put(*here, "components", to=[{"axis": "row", "exponent": 0}])
    )
    yield fits("same-no-base", (dataclasses.replace(same("w", (3,)), base=None),))
    yield fits("same-sha256", (same("w", (3,)),), manifest=put(*here, "sha256", to=digest))
    yield fits("same-tail-no-sha256", (same("w", (3,), base_rows=2),), manifest=put(*here, "sha256", to=None))
    for dtype, base in (
        ("I16", "U16"),
        ("F32", "I32"),
        ("F32", "F64"),
        ("F64", "F32"),
        ("U8", "BOOL"),
        ("F8_E4M3", "F8_E5M2"),
        ("BF16", "F8_E4M3"),
    ):
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
    yield fits(
        "same-base-transposed",
        (dataclasses.replace(same("w", (3, 9)), base=Base(dtype="BF16", shape=(9, 3), data=bytes(54))),),
        "3.10",
    )
    yield fits(
        "same-batch-differs",
        (dataclasses.replace(same("w", (2, 3, 4)), base=Base(dtype="BF16", shape=(2, 2, 4), data=bytes(32))),),
        "3.10",
    )
    yield fits(
        "same-no-dimensions-on-one",
        (dataclasses.replace(same("w", (), dtype="I64"), base=Base(dtype="I64", shape=(1,), data=bytes(8))),),
        "3.10",
    )
    unsorted = Content(
        modules=(
            same("z", (2,)),
            sign("b", (2, 9)),
            full("a", (2,), base=Base(dtype="BF16", shape=(2,), data=b"1234")),
            full("n", (1,)),
        )
    )

    def digest_as(slug: str, change: Any) -> Entry:
        def edit(manifest: dict[str, Any]) -> dict[str, Any]:
            return put("base", "digest", to=base_digest(change(manifest["modules"])))(manifest)

        return refused(f"base-digest-{slug}", "E210", "3.11", build(unsorted, manifest=edit))

    yield digest_as("of-nothing", lambda modules: [])
    yield digest_as("without-full", lambda modules: [m for m in modules if m["encoding"] != "full"])
    yield digest_as("of-fine-tuned-names", lambda modules: [{**m, "name": m["name"] + "x"} for m in modules])
    yield digest_as(
        "of-one-other", lambda modules: [{**m, "base": m["base"] and {**m["base"], "sha256": digest}} for m in modules]
    )
    yield refused(
        "base-digest-zeros", "E210", "3.11", build(unsorted, manifest=put("base", "digest", to="sha256:" + "0" * 64))
    )
    in_order = json.dumps(
        [[m.name, m.base.dtype, list(m.base.shape), described(m.base)["sha256"]] for m in unsorted.modules if m.base],
        separators=(",", ":"),
    )
    yield refused(
        "base-digest-not-sorted",
        "E210",
        "3.11",
        build(unsorted, manifest=put("base", "digest", to="sha256:" + hexdigest(in_order))),
    )


def hexdigest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def described(base: Base) -> dict[str, Any]:
    return {"dtype": base.dtype, "shape": list(base.shape), "sha256": hashlib.sha256(base.data).hexdigest()}


def assets() -> Iterator[Entry]:
    """SPEC 3.12."""
    wrong = {
        "parent": "../config.json",
        "folder": "a/config.json",
        "backslash": "a\\config.json",
        "absolute": "/config.json",
        "python": "modeling.py",
        "pickle": "model.bin",
        "weights": "model.safetensors",
        "index": "model.safetensors.index.json",
        "index-short": "a.index.json",
        "hidden": ".config.json",
        "only-suffix": ".json",
        "upper-suffix": "config.JSON",
        "121-characters": "x" * 120 + ".json",
        "newline": "config.json\n",
        "nul": "config.json\0",
        "nul-inside": "a\0.json",
        "accent": "caf\u00e9.json",
        "empty": "",
        "no-suffix": "config",
        "dash": "-rf.json",
        "space": "a b.json",
        "space-last": "config.json ",
        "colon": "c:a.json",
        "two-lines": "a\n.json",
        "digit-not-ascii": "\u0665.json",
        "yaml": "config.yaml",
    }
    for slug, path in wrong.items():
        yield refused(f"asset-path-{slug}", "E211", "3.12", build(simple(assets=(Asset(path=path, data=b"{}"),))))
    for slug, paths in (
        ("same", ("a.json", "a.json")),
        ("other-case", ("README.md", "readme.md")),
        ("three", ("a.json", "b.json", "A.json")),
    ):
        held = tuple(Asset(path=path, data=b"{}") for path in paths)
        yield refused(f"asset-twice-{slug}", "E211", "3.12", build(simple(assets=held)))


def tensors() -> Iterator[Entry]:
    """SPEC 4.1 and 4.2. The tensors of SIMPLE: mask, pad, row, pad, full."""
    rich = Content(
        modules=(
            sign("w", (3, 3), ("row+col",), base_rows=2),
            full("v", (2,), dtype="U8"),
            sign("s", (8, 8), ("row",)),
        ),
        assets=(Asset(path="a.json", data=b"{}"), Asset(path="b.json", data=b"[]")),
    )
    square = Content(modules=(sign("w", (8, 8), ("row",)),))
    wrong = {
        "missing-last": (SIMPLE, {"tensors": lambda t: t[:-2], "digested": put("modules", 1, "sha256", to="ab" * 32)}),
        "extra-last": (
            SIMPLE,
            {
                "tensors": lambda t: [
                    *t,
                    dataclasses.replace(t[3], name="__pad__.2", shape=(54,), data=bytes(54)),
                    dataclasses.replace(t[4], name="extra", owner=("other", 0)),
                ]
            },
        ),
        "pad-last": (
            SIMPLE,
            {"tensors": lambda t: [*t, dataclasses.replace(t[3], name="__pad__.2", shape=(54,), data=bytes(54))]},
        ),
        "mask-name": (SIMPLE, {"tensors": retensor(0, name="model.q_proj.weight.0.signs")}),
        "mask-index": (SIMPLE, {"tensors": retensor(0, name="model.q_proj.weight.1.mask")}),
        "module-name": (SIMPLE, {"tensors": retensor(4, name="model.norm.weigh.full")}),
        "name-case": (SIMPLE, {"tensors": retensor(4, name="model.norm.weight.FULL")}),
        "mask-signed": (SIMPLE, {"tensors": retensor(0, dtype="I8")}),
        "scale-bf16": (SIMPLE, {"tensors": retensor(2, dtype="BF16")}),
        "scale-u16": (SIMPLE, {"tensors": retensor(2, dtype="U16")}),
        "mask-flat": (SIMPLE, {"tensors": retensor(0, shape=(6,))}),
        "mask-transposed": (SIMPLE, {"tensors": retensor(0, shape=(2, 3))}),
        "scale-two-dimensions": (SIMPLE, {"tensors": retensor(2, shape=(3, 1))}),
        "full-flat": (Content(modules=(full("w", (2, 3)),)), {"tensors": retensor(0, shape=(6,))}),
        "full-dtype": (SIMPLE, {"tensors": retensor(4, dtype="F16")}),
        "full-bytes": (SIMPLE, {"tensors": retensor(4, dtype="U8", shape=(10,))}),
        "scale-of-other-axis": (square, {"tensors": retensor(1, name="w.0.col")}),
        "axis-of-other-scale": (square, {"manifest": put("modules", 0, "components", 0, "axis", to="col")}),
        "no-scale": (square, {"tensors": drop_tensor(-1)}),
        "scales-swapped": (rich, {"tensors": swapped(2, 4)}),
        "no-tail": (
            Content(modules=(same("w", (3,), base_rows=2), full("v", (1,)))),
            {"tensors": lambda t: [dataclasses.replace(t[0], name="w.full"), *t[1:]]},
        ),
        "row-col-without-col": (Content(modules=(sign("w", (8, 8), ("row+col",)),)), {"tensors": lambda t: t[:2]}),
        "module-order": (SIMPLE, {"manifest": lambda m: {**m, "modules": m["modules"][::-1]}}),
        "component-order": (
            Content(modules=(sign("w", (8, 8), ("row", "col")),)),
            {
                "manifest": put(
                    "modules", 0, "components", to=[{"axis": "col", "exponent": 0}, {"axis": "row", "exponent": 0}]
                )
            },
        ),
        "asset-missing": (
            rich,
            {"manifest": lambda m: {**m, "assets": [*m["assets"], {"path": "c.json", "sha256": "ab" * 32}]}},
        ),
        "asset-extra": (rich, {"manifest": lambda m: {**m, "assets": m["assets"][:1]}}),
        "asset-shape": (rich, {"tensors": lambda t: [*t[:-1], dataclasses.replace(t[-1], shape=(1, 2))]}),
        "asset-dtype": (rich, {"tensors": lambda t: [*t[:-1], dataclasses.replace(t[-1], dtype="I8")]}),
        "asset-name": (rich, {"tensors": lambda t: [*t[:-1], dataclasses.replace(t[-1], name="__asset__.2")]}),
        "asset-by-path": (rich, {"tensors": lambda t: [*t[:-1], dataclasses.replace(t[-1], name="__asset__.b.json")]}),
        "asset-first": (
            Content(
                modules=(full("v", (64,), dtype="U8"),), assets=(Asset(path="a.json", data=b"{" + b" " * 62 + b"}"),)
            ),
            {"tensors": swapped(0, 1)},
        ),
    }
    for slug, (content, hooks) in wrong.items():
        yield refused(f"tensors-{slug}", "E212", "4.1", build(content, **hooks))
    two_pads = Content(modules=(sign("w", (8, 8), ("row",)), full("v", (64,), dtype="U8"), full("u", (1,), dtype="U8")))
    pads = {
        "missing": (SIMPLE, {"tensors": drop_tensor(1)}),
        "all-missing": (SIMPLE, {"tensors": lambda t: [x for x in t if x.owner[0] != "pad"]}),
        "name": (SIMPLE, {"tensors": retensor(1, name="__padding__.0")}),
        "index": (SIMPLE, {"tensors": retensor(1, name="__pad__.7")}),
        "index-restarts": (
            SIMPLE,
            {
                "tensors": lambda t: [
                    x if x.name != "__pad__.1" else dataclasses.replace(x, name="__pad__.00") for x in t
                ]
            },
        ),
        "zero-filled-index": (SIMPLE, {"tensors": retensor(1, name="__pad__.00")}),
        "longer": (SIMPLE, {"tensors": retensor(1, shape=(122,), data=bytes(122))}),
        "of-16": (SIMPLE, {"tensors": retensor(1, shape=(10,), data=bytes(10))}),
        "two-for-one": (
            SIMPLE,
            {
                "tensors": lambda t: [
                    t[0],
                    dataclasses.replace(t[1], shape=(8,), data=bytes(8)),
                    dataclasses.replace(t[1], name="__pad__.1", shape=(50,), data=bytes(50)),
                    t[2],
                    dataclasses.replace(t[3], name="__pad__.2"),
                    t[4],
                ]
            },
        ),
        "not-needed": (
            two_pads,
            {
                "tensors": lambda t: [
                    *t[:5],
                    dataclasses.replace(t[1], name="__pad__.2", shape=(64,), data=bytes(64)),
                    t[5],
                ]
            },
        ),
        "shape": (SIMPLE, {"tensors": retensor(1, shape=(29, 2))}),
        "dtype": (SIMPLE, {"tensors": retensor(1, dtype="I8")}),
        "first": (
            SIMPLE,
            {
                "tensors": lambda t: [
                    dataclasses.replace(t[1], shape=(64,), data=bytes(64)),
                    t[0],
                    dataclasses.replace(t[1], name="__pad__.1"),
                    t[2],
                    dataclasses.replace(t[3], name="__pad__.2"),
                    t[4],
                ]
            },
        ),
    }
    for slug, (content, hooks) in pads.items():
        yield refused(f"pad-{slug}", "E212", "4.2", build(content, **hooks))
    yield refused(
        "only-metadata",
        "E212",
        "4.1",
        build(ONE, tensors=lambda t: [], manifest=put("modules", 0, "sha256", to="ab" * 32)),
    )


def orders() -> Iterator[Entry]:
    """SPEC 8: two faults, and the step that comes first wins."""
    unknown = put("features", to=["x-conformance"])
    yield refused(
        "order-container-before-profile", "E124", "2.18", build(SIMPLE, manifest=unknown, file=lambda f: f[:-1])
    )
    yield refused(
        "order-duplicate-before-manifest",
        "E115",
        "2.9",
        build(SIMPLE, manifest=unknown, header=replaced('"dtype":"U8",', '"dtype":"U8","dtype":"U8",')),
    )
    yield refused(
        "order-version-before-json", "E201", "2.6", frame(b'{"__metadata__":{"format":"pxd","pxd":"9.9"', b"")
    )
    yield refused(
        "order-length-before-version",
        "E111",
        "2.4",
        build(SIMPLE, version="2.0", file=lambda f: (8184).to_bytes(8, "little") + f[8:4096]),
    )
    yield refused(
        "order-canonical-before-features", "E203", "3.2", build(SIMPLE, manifest=unknown, text=lambda t: t + " ")
    )
    yield refused(
        "order-features-before-schema",
        "E204",
        "3.3",
        build(SIMPLE, manifest=lambda m: {**m, "features": ["x-conformance"], "later": {}}),
    )
    yield refused(
        "order-profile-before-payload",
        "E205",
        "3.4",
        build(SIMPLE, manifest=put("zzz", to=1), data=lambda d: b"\xff" + d[1:]),
    )
    yield refused(
        "order-record-before-manifest", "E119", "2.13", build(SIMPLE, manifest=unknown, records=record(-1, dtype="F8"))
    )


def profile() -> Iterator[Entry]:
    """Every case of this module."""
    for group in (names, limits, encodings, assets, tensors, orders):
        yield from group()
