"""Exact updates that every reader of the feature `exact` accepts and applies (SPEC 3.14, 5.6 to 5.9, 6.6)."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .blocks import BLOCK, FORMS, Block, Form, best, gaps, keyed, patterns
from .build import build, expected, manifest_text
from .content import Asset, Base, Content, Module, full, noise, same, sign, weights, words
from .entry import Entry
from .roundings import accepted

__all__ = ["EXAMPLE", "applied_updates", "changed", "golden_updates", "moved", "one", "spread", "update", "updates"]

Case = tuple[str, str, Content]
Coder = Callable[[Sequence[int], Sequence[int], Form], Block]
# SPEC 13: the worked example of a keyed block of A = 122.
EXAMPLE = (
    tuple(
        int(word, 16)
        for word in "bd24 bd99 3e6f bdc7 3d55 be4c bddb be6d bd8b 3e3b 3ae9 3e6a bd6b bdc3 bca0 3e7a".split()
    ),
    {5: 0xBE4B, 6: 0xBDDC, 9: 0x3E66, 10: 0x3AE4},
    bytes.fromhex("31419366 3e0900"),
)
SPECIALS = {
    "BF16": "0000 8000 0001 8001 007f 0080 7f7f ff7f 7f80 ff80 7f81 ff81 7fc0 ffc1 7fff ffff",
    "F16": "0000 8000 0001 8001 03ff 0400 7bff fbff 7c00 fc00 7c01 fc01 7e00 fe01 7fff ffff",
    "F32": "00000000 80000000 00000001 80000001 007fffff 00800000 7f7fffff ff7fffff 7f800000 ff800000 7f800001 "
    "ffc12345 7fc00000 ff800001 7fffffff ffffffff",
}


def spread(seed: str, dtype: str, count: int) -> list[int]:
    """Weights with exponents as of a Gaussian: half as many in each exponent below the largest."""
    form, size = FORMS[dtype], FORMS[dtype].width // 8
    top, raw, made = form.exponent(1 << (form.width - 2)) - 3, noise(f"spread {seed}", (size + 2) * count), []
    for i in range(count):
        value = int.from_bytes(raw[i * size : (i + 1) * size], "little")
        chance = int.from_bytes(raw[count * size + 2 * i :][:2], "little") | 1 << 15 - min(top, 12)
        kept = value & (1 << form.mantissa) - 1 | value >> (form.width - 1) << (form.width - 1)
        made.append(kept | (top - (16 - chance.bit_length())) << form.mantissa)
    return made


def moved(old: int, step: int, form: Form) -> int:
    """The pattern `step` places above `old` in the order of values, modulo 2^w."""
    top = 1 << (form.width - 1)
    at = ((old ^ (2 * top - 1 if old & top else top)) + step) % (2 * top)
    return at ^ (top if at & top else 2 * top - 1)


def changed(seed: str, dtype: str, old: Sequence[int], every: int, far: int = 0) -> list[int]:
    """One of `every` weights moves by one; of those one of `far` moves further."""
    made, raw = list(old), noise(f"changed {seed}", 4 * len(old))
    for i, value in enumerate(old):
        dice = int.from_bytes(raw[4 * i : 4 * i + 4], "little")
        if dice % every == 0:
            size = 2 + (dice >> 20) % 400 if far and (dice >> 8) % far == 0 else 1
            made[i] = moved(value, -size if dice >> 31 else size, FORMS[dtype])
    return made


def update(
    name: str,
    old: Sequence[int],
    new: Sequence[int],
    *,
    dtype: str = "BF16",
    shape: tuple[int, ...] | None = None,
    rows: int | None = None,
    coder: Coder = best,
    blocks: Sequence[Block] | None = None,
) -> Module:
    """An `exact` module. old: all of the base; new: the covered weights. rows: those of the base, if they differ."""
    form, size = FORMS[dtype], FORMS[dtype].width // 8
    shape = (len(new),) if shape is None else shape
    base = Base(dtype=dtype, shape=(rows or shape[0], *shape[1:]) if shape else (), data=words(list(old), size))
    if blocks is None:
        pairs = ((old[i : min(i + BLOCK, len(new))], new[i : i + BLOCK]) for i in range(0, len(new), BLOCK))
        blocks = [coder(list(before), list(after), form) for before, after in pairs]
    rest = math.prod(shape) - len(new)
    return Module(
        name=name,
        dtype=dtype,
        shape=shape,
        encoding="exact",
        base=base,
        new=words(list(new), size),
        exact=weights(f"{name} tail", dtype, (rest,)),
        index=tuple(len(data) << 8 | a for a, data in blocks),
        data=b"".join(data for _, data in blocks),
    )


def by_key(a: int) -> Coder:
    """A keyed block of that A."""
    return lambda old, new, form: (a, keyed(old, new, form, a))


def by_gaps(old: Sequence[int], new: Sequence[int], form: Form) -> Block:
    data = gaps(old, new, form)
    if data is None:
        raise ValueError("too many for gaps")
    return 0, data


def by_patterns(old: Sequence[int], new: Sequence[int], form: Form) -> Block:
    return 255, patterns(new, form)


def one(*modules: Module, **more: Any) -> Content:
    return Content(modules=modules, **more)


def modes() -> Iterator[Case]:
    """Each mode on each dtype, with steps of every size."""
    for dtype, key in (("BF16", 121), ("F16", 10), ("F32", 121)):
        old = spread(dtype, dtype, 600)
        new = changed(dtype, dtype, old, 3, 4)
        slug = dtype.lower()
        yield f"keyed-{slug}", "5.9", one(update("w", old, new, dtype=dtype, shape=(20, 30), coder=by_key(key)))
        yield f"gaps-{slug}", "5.8", one(update("w", old, new, dtype=dtype, shape=(20, 30), coder=by_gaps))
        yield f"patterns-{slug}", "5.6", one(update("w", old, new, dtype=dtype, shape=(20, 30), coder=by_patterns))
        few = changed(f"few {dtype}", dtype, old, 60)
        yield f"keyed-few-{slug}", "5.9", one(update("w", old, few, dtype=dtype))
        yield f"gaps-few-{slug}", "5.8", one(update("w", old, few, dtype=dtype, coder=by_gaps))
    before, edits, data = EXAMPLE
    new = [edits.get(i, value) for i, value in enumerate(before)]
    yield "example", "5.9", one(update("w", before, new, blocks=[(122, data)]))


def keys() -> Iterator[Case]:
    """SPEC 5.9: every A that matters, all classes, quotients from 0 to 8, runs over the ends of classes."""
    old = spread("keys", "BF16", 800)
    new = changed("keys", "BF16", old, 7, 9)
    for a in (1, 100, 112, 116, 119, 124, 126, 129, 132):
        yield f"key-{a}", "5.9", one(update("w", old, new, coder=by_key(a)))
    still = [0x7F00 + i % 128 for i in range(3000)]
    yield "key-254", "5.9", one(update("w", still, [v + 1 if v == 0x7F22 else v for v in still], coder=by_key(254)))
    lone = [*still[:-1], 0x7F81]
    yield "runs-of-many", "5.9", one(update("w", still, [*lone[:-1], still[-1] ^ 0x8000], coder=by_key(254)))
    tiny = [i % 128 | (i & 1) << 15 for i in range(2000)]
    yield "key-1-subnormal", "5.9", one(update("w", tiny, changed("tiny", "BF16", tiny, 9), coder=by_key(1)))
    classes = [(120 + i % 17) << 7 | i % 128 for i in range(1700)]
    yield "every-class", "5.9", one(update("w", classes, changed("classes", "BF16", classes, 2), coder=by_key(121)))
    yield "last-class-only", "5.9", one(update("w", classes, changed("last", "BF16", classes, 50), coder=by_key(90)))
    base = [0x3F80] * 40 + [0x4600] * 200
    stepped = [moved(v, (i // 2 + 1) * (-1) ** i, FORMS["BF16"]) if i < 40 else v for i, v in enumerate(base)]
    for a in (128, 129, 130, 140):
        yield f"quotients-{a}", "5.9", one(update("w", base, stepped, coder=by_key(a)))
    yield "dense-all-still", "5.9", one(update("w", base, [*base[:-1], 0x3F81], coder=by_key(128)))


def spacings() -> Iterator[Case]:
    """SPEC 5.8: gaps of bytes and of 16 bits, where one ends and the other begins; blocks of one kind alone."""
    for slug, count, places in (
        ("bytes-at-border", 768, (0, 767)),
        ("words-beyond-border", 769, (0, 768)),
        ("byte-254", 700, (254, 300)),
        ("byte-255", 700, (255, 300)),
        ("last-byte-254", 700, (10, 265)),
        ("last-byte-0", 700, (10, 266)),
        ("byte-510", 700, (510, 690)),
        ("byte-511", 700, (511, 690)),
        ("bytes-next-to-each-other", 100, tuple(range(90))),
        ("eight-moves", 100, tuple(range(0, 80, 10))),
        ("nine-moves", 100, tuple(range(0, 90, 10))),
    ):
        old = spread(slug, "BF16", count)
        new = [moved(v, (-1) ** (i % 3), FORMS["BF16"]) if i in places else v for i, v in enumerate(old)]
        yield f"gaps-{slug}", "5.8", one(update("w", old, new, coder=by_gaps))
    alone = spread("alone", "BF16", 200)
    yield from exceptions(alone)


def exceptions(old: list[int]) -> Iterator[Case]:
    far = [value ^ 0x8000 if i in (0, 7, 199) else value for i, value in enumerate(old)]
    yield "gaps-exceptions-alone", "5.8", one(update("w", old, far, coder=by_gaps))
    yield "gaps-of-nothing", "5.8", one(update("w", old, old, blocks=[(0, bytes(4))]))
    hidden = [*far[:7], old[7], *far[8:]]
    listed = words([0, 3, 0, 7, 199, far[0], old[7], far[199]])
    yield "gaps-exception-that-stays", "5.8", one(update("w", old, hidden, blocks=[(0, listed)]))
    near = [*old[:4], moved(old[4], 1, FORMS["BF16"]), *old[5:]]
    yield "gaps-move-as-exception", "5.8", one(update("w", old, near, blocks=[(0, words([0, 1, 4, near[4]]))]))


def patterns_of_all() -> Iterator[Case]:
    """SPEC 6.6: NaN payloads, infinities, zeros of both signs, and steps around them."""
    for dtype, listed in SPECIALS.items():
        special = [int(word, 16) for word in listed.split()]
        form, slug = FORMS[dtype], dtype.lower()
        pairs = [(a, b) for a in special for b in special]
        pairs += [(a, moved(a, step, form)) for a in special for step in (-1, 1, -2, 2, -300, 300)]
        old, new = [a for a, _ in pairs], [b for _, b in pairs]
        top = form.exponent((1 << form.width) - 1)
        yield f"specials-patterns-{slug}", "6.6", one(update("w", old, new, dtype=dtype, coder=by_patterns))
        for word, coder in (("gaps", by_gaps), ("keyed-1", by_key(1)), ("keyed-top", by_key(min(top, 254)))):
            still = 40 * special  # exceptions take more than patterns do: most weights must stay
            yield (
                f"specials-{word}-{slug}",
                "6.6",
                one(
                    update(
                        "w", [*still, *old, *still, *still], [*still, *new, *still, *still], dtype=dtype, coder=coder
                    )
                ),
            )
    around = [0x8000, 0x0000, 0x8000, 0x0000, 0xFFFF, 0x7FFF, 0x7F80, 0xFF80] * 8
    moves = [moved(v, 1 if i % 2 == 0 else -1, FORMS["BF16"]) for i, v in enumerate(around)]
    yield "moves-over-zero-and-ends", "6.6", one(update("w", around, moves, coder=by_gaps))
    yield "moves-over-zero-keyed", "6.6", one(update("w", around, moves, coder=by_key(1)))


def shapes() -> Iterator[Case]:
    """Tails, fewer rows, shapes of every rank, several blocks."""
    old = spread("shapes", "BF16", 120)
    new = changed("shapes", "BF16", old, 4)
    yield "tail", "3.10", one(update("w", old, new, shape=(15, 10), rows=12))
    yield "tail-f32", "3.10", one(update_of_f32())
    yield "fewer-rows", "3.10", one(update("w", old, new[:100], shape=(10, 10), rows=12))
    yield "batch", "3.9", one(update("w", old, new, shape=(2, 3, 20)))
    yield "one-dimension", "3.9", one(update("w", old, new))
    yield "no-dimensions", "3.10", one(update("w", [0x3F80], [0x3F81], shape=()))
    pair = [0x3F80, 0x3F80, 0x3F80]
    yield "one-byte-up", "5.9", one(update("w", pair, [0x3F80, 0x3F81, 0x3F80], coder=by_key(127)))
    yield "one-byte-down", "5.9", one(update("w", pair, [0x3F80, 0x3F7F, 0x3F80], coder=by_key(127)))
    yield "one-weight-keyed", "5.6", one(update("w", [0x3F80], [0x3F81], coder=by_key(128)))
    yield (
        "size-63",
        "4.2",
        one(update("w", old[:100], new[:31] + old[31:100], blocks=None, coder=by_gaps), full("v", (3,))),
    )
    for slug, count in (("block-of-65536", BLOCK), ("block-and-one", BLOCK + 1), ("three-blocks", 2 * BLOCK + 300)):
        ramp = [(i * 7 % 900 + 0x3C00) & 0xFFFF | (i & 1) << 15 for i in range(count)]
        edited = changed(slug, "BF16", ramp, 900, 5)
        for place in (0, BLOCK - 1, count - 1):
            edited[place] = moved(ramp[place], 1, FORMS["BF16"])
        if slug == "three-blocks":
            edited[BLOCK : 2 * BLOCK] = ramp[BLOCK : 2 * BLOCK]
            mixed = [
                by_gaps(ramp[:BLOCK], edited[:BLOCK], FORMS["BF16"]),
                (0, b""),
                by_patterns(ramp[2 * BLOCK :], edited[2 * BLOCK :], FORMS["BF16"]),
            ]
            yield "blocks-mixed", "5.6", one(update("w", ramp, edited, blocks=mixed))
            mixed[0] = by_key(123)(ramp[:BLOCK], edited[:BLOCK], FORMS["BF16"])
            mixed[2] = by_key(121)(ramp[2 * BLOCK :], edited[2 * BLOCK :], FORMS["BF16"])
            yield "blocks-keyed", "5.6", one(update("w", ramp, edited, blocks=mixed))
        else:
            yield slug, "5.6", one(update("w", ramp, edited))
    yield wide_block()


def wide_block() -> Case:
    """A whole block of 32-bit weights is 256 KiB, and a place in its second half needs all 16 bits."""
    old = [0x3F000000 + i * 0x155 & 0xFFFFFFFF | (i & 1) << 31 for i in range(BLOCK + 5)]
    new = list(old)
    for place in (0, 1, 32_767, 32_768, 40_000, BLOCK - 2, BLOCK - 1, BLOCK, BLOCK + 4):
        new[place] = moved(old[place], 1 if place % 2 else -1, FORMS["F32"])
    new[50_000] = old[50_000] ^ 0x80000000
    first = by_key(126)(old[:BLOCK], new[:BLOCK], FORMS["F32"])
    rest = by_patterns(old[BLOCK:], new[BLOCK:], FORMS["F32"])
    return "block-of-256-kib", "5.6", one(update("w", old, new, dtype="F32", blocks=[first, rest]))


def update_of_f32() -> Module:
    old = spread("tail", "F32", 64)
    return update("w", old, changed("tail", "F32", old, 3), dtype="F32", shape=(10, 8), rows=8)


def chains() -> Iterator[Case]:
    """SPEC 3.14: results that are known and that are not; previous; the feature without a module that needs it."""
    old = spread("chain", "BF16", 90)
    first = update("w", old, changed("first", "BF16", old, 4), shape=(9, 10))
    previous = "sha256:" + "5a" * 32
    norm, kept = full("norm", (10,), dtype="F32"), same("gate", (4, 10))
    yield "result-of-all-kinds", "3.14", one(first, norm, kept, previous=previous)
    yield "result-sorted-by-name", "3.14", one(full("z", (2,)), first, full("a", (3,)), full("Z", (2,)))
    yield "result-unknown-sign", "3.14", one(first, sign("s", (3, 9)), previous=previous)
    yield "result-unknown-tail", "3.14", one(first, same("t", (5, 2), base_rows=4))
    yield "result-unknown-fewer-rows", "3.14", one(first, same("t", (4, 2), base_rows=5))
    yield "result-unknown-other-dtype", "3.14", one(first, same("t", (4, 2), dtype="F32", base_dtype="BF16"))
    yield "feature-alone", "3.3", one(norm, kept, chained=True, previous=previous)
    yield "feature-alone-no-result", "3.3", one(sign("s", (3, 9)), chained=True)
    yield (
        "among-others",
        "3.13",
        one(
            sign("embed", (7, 9), base_rows=5),
            first,
            norm,
            update("u", old, changed("u", "BF16", old, 3), shape=(12, 10), rows=9),
            kept,
            tied=(("w", "head"),),
            dropped=("gone",),
            assets=(Asset(path="config.json", data=b"{}"),),
        ),
    )


def updates() -> Iterator[Case]:
    """(slug, clause, content) of every valid file of exact updates."""
    for group in (modes, keys, spacings, patterns_of_all, shapes, chains):
        yield from group()


def golden_updates() -> Iterator[Entry]:
    """The expected result of `decode` for each."""
    for slug, clause, content in updates():
        file = build(content)
        features = tuple(content.features)
        yield Entry(
            id=f"exact-{slug}", clause=clause, files={"file": file}, expect=expected(content, file), features=features
        )


def applied_updates() -> Iterator[Entry]:
    """The expected result of each, and two updates of a chain."""
    for slug, clause, content in updates():
        case = accepted(f"exact-{slug}", clause, content)
        large = any(len(module.new) > BLOCK for module in content.modules)
        yield dataclasses.replace(case, seconds=240) if large else case
    old = spread("two", "BF16", 100)
    middle = changed("two", "BF16", old, 5)
    first = one(update("w", old, middle))
    content_id = "sha256:" + hashlib.sha256(manifest_text(build(first)).encode()).hexdigest()
    second = one(update("w", middle, changed("three", "BF16", middle, 5)), previous=content_id)
    yield accepted("exact-chain-first", "3.14", first)
    yield accepted("exact-chain-second", "3.14", second)
