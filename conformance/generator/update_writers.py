"""Encode cases of exact updates: the block that a writer must choose (SPEC 11.3)."""

from __future__ import annotations

import json
from collections.abc import Iterator

from .blocks import FORMS, best, fastest
from .build import build
from .content import Content, full, same, words
from .encoded import roles, source
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
