"""Files with a malformed or repeated name, or beyond a limit of the manifest (SPEC 3.5, 3.6, 3.8)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from .build import build
from .content import Base, Content, component, full, same, sign
from .entry import Entry, refused
from .faults import added, put, record
from .samples import ONE, WHOLE
from .valid import simple

__all__ = ["limits", "names"]


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
        ("2-53-bytes", "I16", [2**52]),
        ("wraps-to-0", "U8", [2**32, 2**32]),
        ("wraps-to-4", "U8", [2**33 + 2, 2**33 + 2]),
        ("eight-largest", "U8", [2**53 - 1] * 8),
    ):
        claimed = {"name": "v", "encoding": "same", "dtype": dtype, "shape": shape}
        file = build(ONE, manifest=added(claimed, "0" * 64))
        yield refused(f"size-{slug}", "E208", "3.8", file, "of a module that is the base's")
    held = {"name": "w", "encoding": "full", "dtype": "U8", "shape": [1], "base": {"dtype": "BF16", "shape": [2**52]}}
    digests = ("0" * 64, hashlib.sha256(b"v").hexdigest())
    one = Content(modules=(full("w", (1,), dtype="U8", exact=b"v"),))
    yield refused("size-of-base", "E208", "3.8", build(one, manifest=added(held, *digests, replace=True)))
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
