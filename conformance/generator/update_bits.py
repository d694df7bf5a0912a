"""Blocks of exact updates at their edges: counts beyond a byte, bits that are used to the last, runs one short."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from .blocks import BLOCK, FORMS, numbers, packed
from .build import build, expected
from .content import Content, Module, words
from .entry import Entry
from .roundings import accepted
from .update_faults import bad, of_blocks, spaced
from .updates import by_gaps, by_patterns, moved, one, spread, update

__all__ = ["applied_bits", "golden_bits", "refused_bits"]

EXACT = ("exact",)


def many(moves: int, exceptions: int) -> Content:
    """A block of gaps with these numbers."""
    old = spread(f"many {moves} {exceptions}", "BF16", 3000)
    new = list(old)
    for i in range(max(moves, exceptions)):
        if i < moves:
            new[3 * i] = moved(old[3 * i], 1 if i % 3 else -1, FORMS["BF16"])
        if i < exceptions:
            new[3 * i + 1] = old[3 * i + 1] ^ 0x8000
    return one(update("w", old, new, coder=by_gaps))


def filled() -> Module:
    """A keyed block that 7 exceptions fill: they fit (SPEC 5.7), and that a run is missing shows only with the base."""
    old = spread("in part", "BF16", 20)
    new = [value ^ 0x8000 if i < 7 else value for i, value in enumerate(old)]
    fields = [field for i in range(7) for field in ((i, 16), (new[i], 16))]
    return update("w", old, new, blocks=[(1, packed([7], fields, between=0))])


def short() -> Module:
    """Two weights of class 1 and one of class 15 take 2^15 + 1 of a run of 2^15: -1 of its field bits is left."""
    old = [0x4000, 0x4000, 0x4700]
    return update("w", old, old, blocks=[(128, packed([0, 1], []))])


def contents() -> Iterator[tuple[str, str, Content]]:
    """What every reader accepts and applies."""
    yield "gaps-300-moves", "5.8", many(300, 2)
    yield "gaps-300-exceptions", "5.8", many(2, 300)
    yield "gaps-256-of-both", "5.8", many(256, 256)
    # The patterns of two exceptions look like places, the second one like that of the move.
    old = spread("places", "BF16", 400)
    like = [3, 300, *old[2:300], moved(old[300], 1, FORMS["BF16"]), *old[301:]]
    yield "gaps-patterns-like-places", "5.8", one(update("w", old, like, coder=by_gaps))
    yield from overridden()


def overridden() -> Iterator[tuple[str, str, Content]]:
    """A keyed block whose exception is a weight with a number of class 0, or one that moves."""
    form, key = FORMS["BF16"], 121
    old = spread("overridden", "BF16", 200)
    dense = next(i for i, value in enumerate(old) if form.exponent(value) < key)
    sparse = next(i for i, value in enumerate(old) if form.exponent(value) > key)
    for slug, place, step in (("in-class-0", dense, 3), ("that-moves", sparse, -1)):
        coded = [moved(value, step, form) if i == place else value for i, value in enumerate(old)]
        new = [value ^ 0x8000 if i == place else value for i, value in enumerate(old)]
        (_, *unary), fields = numbers(old, coded, form, key)
        block = packed([1, *unary], [(place, 16), (new[place], 16), *fields])
        yield f"keyed-exception-{slug}", "5.9", one(update("w", old, new, blocks=[(key, block)]))


def sixteen() -> Module:
    """An index of 64 bytes, behind which the data begins at once: the first and the last of 16 blocks change."""
    old = [0x3F80] * (16 * BLOCK)
    new = [0x3F81, *old[1:-1], 0x3F7F]
    first, last = by_gaps(old[:BLOCK], new[:BLOCK], FORMS["BF16"]), by_gaps(old[:BLOCK], new[-BLOCK:], FORMS["BF16"])
    return update("w", old, new, shape=(1024, 1024), blocks=[first, *[(0, b"")] * 14, last])


def whole() -> Module:
    """A block of new patterns whose length takes 18 bits of its entry."""
    new = [i % 300 for i in range(BLOCK)]
    return update("w", [0x3F80] * BLOCK, new, coder=by_patterns)


def golden_bits() -> Iterator[Entry]:
    """What `decode` must say; what only the base can refuse is accepted without it."""
    alone = (
        ("exceptions-fill-the-block", "5.7", one(filled())),
        ("sixteen-blocks", "5.6", one(sixteen())),
        ("patterns-of-128-kib", "5.6", one(whole())),
    )
    for slug, clause, content in (*contents(), *alone):
        file = build(content)
        yield Entry(
            id=f"exact-{slug}", clause=clause, files={"file": file}, expect=expected(content, file), features=EXACT
        )


def refused_bits() -> Iterator[Entry]:
    """Exceptions that are moves too, at places beyond a byte: the low byte of one, or bytes of two, name another."""
    for at, *more in ((300,), (256, 590)):
        block = (0, spaced(1, (10, at, *more), words([at])))
        yield bad(f"move-is-exception-{at}", "E307", "5.7", build(of_blocks(block)))


def applied_bits() -> Iterator[Entry]:
    """What becomes of them, and what the base refuses."""
    for slug, clause, content in contents():
        yield accepted(f"exact-{slug}", clause, content)
    for slug, module in (("exceptions-alone", filled()), ("last-run-less-by-one", short())):
        entry = accepted(f"exact-bits-{slug}", "7.4", one(module))
        files = {role: data for role, data in entry.files.items() if role != "output"}
        yield dataclasses.replace(entry, phase="binding", codes=("E405",), files=files)
