"""Encode cases: content as plain files, and the one file that a writer must write for it (SPEC 11)."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from .build import build
from .content import Asset, Base, Content, full, same, sign, words
from .entry import Entry
from .valid import example, padded_to, simple

__all__ = ["encoded", "source"]

Files = dict[str, bytes]


def source(content: Content) -> Files:
    """content.json and the files that it names: signs one byte a weight, scales F16, exact tensors raw."""
    files: Files = {}

    def put(name: str, data: bytes) -> str:
        files[name] = data
        return name

    def base(held: Base | None) -> Any:
        return held and {"dtype": held.dtype, "shape": list(held.shape), "sha256": digest(held.data)}

    modules = []
    for i, module in enumerate(content.modules):
        parts = [
            {"axis": part.axis, "exponent": part.exponent, "signs": put(f"{i}.{k}.signs", part.signs)}
            | {word: put(f"{i}.{k}.{word}", words(values)) for word, values in part.scales}
            for k, part in enumerate(module.components)
        ]
        entry = {
            "name": module.name,
            "dtype": module.dtype,
            "shape": list(module.shape),
            "encoding": module.encoding,
            "base": base(module.base),
            "components": parts,
        }
        if module.exact:
            entry["exact"] = put(f"{i}.exact", module.exact)
        modules.append(entry)
    said = {
        "base": {"id": content.base[0], "revision": content.base[1]},
        "fine_tuned": {"id": content.fine_tuned[0], "revision": content.fine_tuned[1]},
        "producer": {"name": content.producer[0], "version": content.producer[1]},
        "calibration": content.calibration,
        "metadata": content.metadata,
        "modules": modules,
        "tied": [list(pair) for pair in content.tied],
        "dropped": list(content.dropped),
        "assets": [
            {"path": asset.path, "file": put(f"asset.{i}", asset.data)} for i, asset in enumerate(content.assets)
        ],
    }
    return {"content.json": (json.dumps(said, indent=1) + "\n").encode(), **files}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def roles(files: Files) -> dict[str, bytes]:
    return {f"source/{name}": data for name, data in files.items()}


def accepted(slug: str, clause: str, content: Content, files: Files | None = None) -> Entry:
    return Entry(
        id=slug, clause=clause, operation="encode", files={**roles(files or source(content)), "output": build(content)}
    )


def edited(files: Files, edit: Callable[[dict[str, Any]], object]) -> Files:
    """The source with another content.json."""
    said = json.loads(files["content.json"])
    edit(said)
    return {**files, "content.json": (json.dumps(said, indent=1) + "\n").encode()}


def good() -> Iterator[Entry]:
    for axis in ("row", "col", "row+col", "tensor"):
        yield accepted(f"axis-{axis.replace('+', '-')}", "11.1", Content(modules=(sign("w", (3, 11), (axis,)),)))
    yield accepted("everything", "11.1", example())
    yield accepted("batch", "11.1", Content(modules=(sign("w", (2, 3, 9), ("row", "row+col")),)))
    yield accepted("no-data", "11.1", Content(modules=(same("w", (3,)),)))
    yield accepted("header-no-spaces", "11.2", padded_to(4088))
    yield accepted("header-4095-spaces", "11.2", padded_to(4089))
    yield accepted(
        "pads",
        "11.2",
        Content(modules=tuple(full(f"m{i}", (n,), dtype="U8") for i, n in enumerate((1, 64, 63, 65, 3)))),
    )
    yield accepted(
        "metadata-order",
        "11.2",
        simple(metadata={"\ufb33": '\x00\x1f"\\/\x7f', "\U0001f600": "\u2028", "b": "", "a": "\n"}),
    )
    lists = simple(
        tied=(("model.norm.weight", "A"), ("model.q_proj.weight", "a"), ("model.norm.weight", "z")),
        dropped=("A0", "B", "a0"),
    )
    shuffled = edited(
        source(lists),
        lambda said: (
            said["tied"].reverse(),
            said["dropped"].reverse(),
            said["modules"][0].update(base=said["modules"][0].pop("base")),
        ),
    )
    yield accepted("lists-in-any-order", "11.1", lists, shuffled)


def bad() -> Iterator[Entry]:
    content = Content(modules=(sign("w", (3, 9)), full("v", (2,))), assets=(Asset(path="a.json", data=b"{}"),))
    files = source(content)
    first: Any = lambda said: said["modules"][0]  # noqa: E731
    edits: dict[str, Callable[[dict[str, Any]], object]] = {
        "exponent": lambda s: first(s)["components"][0].update(exponent=64),
        "name": lambda s: first(s).update(name="a/b"),
        "name-twice": lambda s: first(s).update(name="v"),
        "alias-of-nothing": lambda s: s.update(tied=[["x", "y"]]),
        "dropped-is-module": lambda s: s.update(dropped=["v"]),
        "asset-path": lambda s: s["assets"][0].update(path="../a.json"),
        "dtype": lambda s: first(s).update(dtype="I16"),
        "no-components": lambda s: first(s).update(components=[]),
        "nine-components": lambda s: first(s).update(components=first(s)["components"] * 9),
        "columns-differ": lambda s: first(s)["base"].update(shape=[3, 8]),
        "no-base": lambda s: first(s).update(base=None),
        "no-modules": lambda s: s.update(modules=[]),
        "metadata-number": lambda s: s["metadata"].update(n=1),
        "lone-surrogate": lambda s: s["metadata"].update(n="\ud800"),
    }
    for slug, edit in edits.items():
        yield refusal(slug, edited(copy.deepcopy(files), edit))
    for slug, value in (("infinite", 0x7C00), ("not-a-number", 0x7E00)):
        yield refusal(f"scale-{slug}", {**files, "0.0.row": words((0x3C00, value, 0x3C00))})
    yield refusal("scales-too-few", {**files, "0.0.row": words((0x3C00, 0x3C00))})
    yield refusal("signs-too-few", {**files, "0.0.signs": files["0.0.signs"][:-1]})
    yield refusal("exact-too-long", {**files, "1.exact": files["1.exact"] + b"\0\0"})


def refusal(slug: str, files: Files, features: tuple[str, ...] = ()) -> Entry:
    return Entry(
        id=f"refuse-{slug}", clause="11.2", operation="encode", phase="any", files=roles(files), features=features
    )


def encoded() -> Iterator[Entry]:
    """Every case of this module."""
    yield from good()
    yield from bad()
