"""Encode cases of exact updates: the block that a writer must choose (SPEC 11.3)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from .blocks import FORMS, best, fastest
from .build import build
from .content import Content, full, same, words
from .encoded import edited, refusal, roles, source
from .entry import Entry
from .update_faults import NEW, OLD, held
from .updates import changed, moved, one, spread, update

__all__ = ["encoded_updates"]

PREVIOUS = "sha256:" + "5a" * 32


def encoded_updates() -> Iterator[Entry]:
    """SPEC 11.3: the block that a writer must choose, by size and by speed."""
    for prefer, coder in (("size", best), ("speed", fastest)):
        for dtype in ("BF16", "F16", "F32"):
            old = spread(f"writer {dtype}", dtype, 900)
            for word, every, far in (("few", 150, 0), ("some", 20, 9), ("half", 2, 9), ("most", 1, 3)):
                new = changed(word, dtype, old, every, far)
                content = one(update("w", old, new, dtype=dtype, shape=(30, 30), coder=coder))
                yield written(
                    f"{prefer}-{dtype.lower()}-{word}", content, {"w": words(new, FORMS[dtype].width // 8)}, prefer
                )
    old = spread("unchanged", "BF16", 64)
    kept = one(same("w", (8, 8), base=words(old)), full("v", (2,)), chained=True)
    yield written("all-unchanged", kept, {"w": words(old)}, "size")
    tailed = one(update("w", OLD, NEW, shape=(24, 30), rows=20), full("v", (2,)), previous=PREVIOUS)
    yield written("tail-and-previous", tailed, {"w": words(NEW) + tailed.modules[0].exact}, "size")
    lone = one(update("w", OLD, [*OLD[:77], moved(OLD[77], 300, FORMS["BF16"]), *OLD[78:]]))
    yield written("one-exception", lone, {"w": lone.modules[0].new}, "size")
    yield from refused_sources()


def refused_sources() -> Iterator[Entry]:
    """SPEC 11.2: content of exact updates that no valid file can have."""
    content = one(update("w", OLD[:90], NEW[:90], shape=(9, 10)), full("v", (2,)), previous=PREVIOUS)
    good = written("", content, {"w": content.modules[0].new}, "size")
    files = {
        role.removeprefix("source/"): data
        for role, data in good.files.items()
        if role.startswith("source/") and isinstance(data, bytes)
    }
    first: Any = lambda said: said["modules"][0]  # noqa: E731
    edits: dict[str, Callable[[dict[str, Any]], object]] = {
        "no-base": lambda s: first(s).update(base=None),
        "base-of-another-dtype": lambda s: first(s)["base"].update(dtype="F16"),
        "of-integers": lambda s: (first(s).update(dtype="I16"), first(s)["base"].update(dtype="I16")),
        "of-wider-base": lambda s: first(s)["base"].update(dtype="F32"),
        "columns-differ": lambda s: first(s)["base"].update(shape=[10, 9]),
        "rank-differs": lambda s: first(s)["base"].update(shape=[9, 5, 2]),
        "base-flat": lambda s: first(s)["base"].update(shape=[90]),
        "name": lambda s: first(s).update(name="a/b"),
        "name-twice": lambda s: first(s).update(name="v"),
        "shape-zero": lambda s: first(s).update(shape=[0, 10]),
        "shape-of-more": lambda s: first(s).update(shape=[10, 10]),
        "shape-of-less": lambda s: first(s).update(shape=[8, 10]),
        "base-digest-short": lambda s: first(s)["base"].update(sha256="ab"),
        "base-digest-upper-case": lambda s: first(s)["base"].update(sha256="AB" * 32),
        "previous-without-algorithm": lambda s: s.update(previous="5a" * 32),
        "previous-short": lambda s: s.update(previous="sha256:5a"),
        "previous-upper-case": lambda s: s.update(previous="sha256:" + "5A" * 32),
        "previous-number": lambda s: s.update(previous=5),
        "alias-of-nothing": lambda s: s.update(tied=[["x", "y"]]),
        "alias-is-module": lambda s: s.update(tied=[["w", "v"]]),
        "dropped-is-module": lambda s: s.update(dropped=["w"]),
    }
    for slug, edit in edits.items():
        yield refusal(f"exact-{slug}", edited(files, edit), ("exact",))
    for slug, name, change in (
        ("old-too-few", "0.old", lambda data: data[:-2]),
        ("old-of-half-a-weight", "0.old", lambda data: data[:-1]),
        ("old-too-many", "0.old", lambda data: data + bytes(2)),
        ("new-too-few", "0.new", lambda data: data[:-2]),
        ("new-too-many", "0.new", lambda data: data + bytes(2)),
        ("new-of-nothing", "0.new", lambda data: b""),
    ):
        yield refusal(f"exact-{slug}", {**files, name: change(files[name])}, ("exact",))


def written(slug: str, content: Content, new: dict[str, bytes], prefer: str) -> Entry:
    """The source names `exact` and has old and new weights; the writer chooses their encoding."""
    files = source(content)
    said = json.loads(files["content.json"])
    for i, (entry, module) in enumerate(zip(said["modules"], content.modules, strict=True)):
        if module.name in new:
            files.pop(f"{i}.exact", None)
            entry.pop("exact", None)
            entry |= {"encoding": "exact", "old": f"{i}.old", "new": f"{i}.new"}
            files |= {f"{i}.old": held(module).data, f"{i}.new": new[module.name]}
    said |= {"chained": True, "previous": content.previous, "prefer": prefer}
    files["content.json"] = (json.dumps(said, indent=1) + "\n").encode()
    return Entry(
        id=f"exact-{slug}",
        clause="11.3",
        operation="encode",
        files={**roles(files), "output": build(content)},
        features=("exact",),
    )
