"""Files with wrong encodings, base digests or assets (SPEC 3.9 to 3.12)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from .build import Tensor, base_digest, bases, build
from .content import Asset, Base, Content, Module, component, full, same, sign
from .entry import Entry, refused
from .faults import put
from .valid import simple

__all__ = ["assets", "encodings"]


FULL = Tensor(name="w.full", dtype="U8", shape=(1,), data=b"v", owner=("module", 0))


def encodings() -> Iterator[Entry]:
    """SPEC 3.9 to 3.11."""

    def fits(slug: str, modules: tuple[Module, ...], clause: str = "3.9", **hooks: Any) -> Entry:
        return refused(f"fit-{slug}", "E209", clause, build(Content(modules=modules), **hooks))

    digest = "ab" * 32
    whole = sign("w", (3, 9))
    bare: dict[str, Any] = {
        "tensors": lambda t: [dataclasses.replace(FULL, name="w.delta", shape=(64,), data=bytes(64))]
    }
    yield fits("sign-no-components", (sign("w", (3, 9), components=()),), **bare)
    for dtype in ("I8", "F64", "F8_E4M3", "BOOL"):
        yield fits(f"sign-of-{dtype.lower().replace('_', '-')}", (sign("w", (3, 9), dtype=dtype, base_dtype="BF16"),))
        yield fits(f"sign-on-{dtype.lower().replace('_', '-')}", (sign("w", (3, 9), base_dtype=dtype),))
    yield fits("sign-no-base", (dataclasses.replace(whole, base=None),))
    yield fits("sign-one-dimension", (sign("w", (9,), components=(component("c", (1, 9), "tensor"),)),))
    yield fits("same-no-base", (dataclasses.replace(same("w", (3,)), base=None),))
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
            made: dict[str, Any] = put("base", "digest", to=base_digest(change(list(bases(manifest)))))(manifest)
            return made

        return refused(f"base-digest-{slug}", "E210", "3.11", build(unsorted, manifest=edit))

    yield digest_as("of-nothing", lambda rows: [])
    yield digest_as("without-full", lambda rows: [row for row in rows if row[0] != "a"])
    yield digest_as("of-fine-tuned-names", lambda rows: [[row[0] + "x", *row[1:]] for row in rows])
    yield digest_as("of-one-other", lambda rows: [*rows[:-1], [*rows[-1][:3], digest]])
    yield digest_as("of-other-dtypes", lambda rows: [[row[0], "F16", *row[2:]] for row in rows])
    yield digest_as("of-other-shapes", lambda rows: [[*row[:2], [1, *row[2]], row[3]] for row in rows])
    yield refused(
        "base-digest-zeros", "E210", "3.11", build(unsorted, manifest=put("base", "digest", to="sha256:" + "0" * 64))
    )
    in_order = json.dumps(
        [[m.name, m.base.dtype, list(m.base.shape), digest_of(m.base)] for m in unsorted.modules if m.base],
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


def digest_of(base: Base) -> str:
    return hashlib.sha256(base.data).hexdigest()


def assets() -> Iterator[Entry]:
    """SPEC 3.12."""
    wrong = {
        "parent": "../config.json",
        "folders": "a/b/config.json",
        "folder-empty": "a//config.json",
        "folder-dot": "./config.json",
        "folder-with-dot": "a.b/config.json",
        "folder-hidden": ".a/config.json",
        "folder-dash": "-a/config.json",
        "folder-64-characters": "a" * 64 + "/config.json",
        "folder-accent": "caf\u00e9/config.json",
        "folder-hidden-file": "a/.config.json",
        "folder-only-suffix": "a/.json",
        "folder-last": "a.json/",
        "folder-121-characters": "a/" + "x" * 120 + ".json",
        "folder-python": "a/modeling.py",
        "folder-index": "a/model.index.json",
        "folder-parent": "a/../config.json",
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
        ("folder-other-case", ("A/config.json", "a/config.json")),
        ("three", ("a.json", "b.json", "A.json")),
    ):
        held = tuple(Asset(path=path, data=b"{}") for path in paths)
        yield refused(f"asset-twice-{slug}", "E211", "3.12", build(simple(assets=held)))
