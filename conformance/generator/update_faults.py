"""Exact updates with one fault: profile (SPEC 3.3 to 3.14), payload (5.7, 5.8), binding (7.3, 7.4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from .blocks import BLOCK, FORMS, Block, keyed, numbers, packed
from .build import build, result_digest, table, untabled
from .content import Base, Content, Module, full, same, sign, words
from .encoded import digest
from .entry import PHASES, Entry, refused
from .faults import bytes_at, patched, put, removed, retensor
from .rebuild import apply
from .updates import changed, moved, one, spread, update

__all__ = ["NEW", "OLD", "bad", "held", "of_blocks", "refused_bindings", "refused_updates", "spaced"]

FORM = FORMS["BF16"]
OLD = spread("faults", "BF16", 600)
NEW = [*changed("faults", "BF16", OLD, 5, 6)[:-9], *OLD[-9:]]  # the last run is none of 0
GOOD = update("w", OLD, NEW, shape=(20, 30), coder=lambda old, new, form: (121, keyed(old, new, form, 121)))
CHAIN = one(GOOD, full("norm", (5,)), same("gate", (3, 4)), previous="sha256:" + "5a" * 32)
EXACT = ("exact",)


def bad(slug: str, codes: str, clause: str, file: bytes, features: tuple[str, ...] = EXACT) -> Entry:
    return refused(f"exact-{slug}", codes, clause, file, features=features)


def of_module(index: int, **changes: Any) -> Any:
    """Change keys of one module of the manifest."""

    def edit(manifest: dict[str, Any]) -> dict[str, Any]:
        modules = [dict(m) for m in manifest["modules"]]
        modules[index] |= changes
        return {**manifest, "modules": modules}

    return edit


def plain(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest without the feature and its keys."""
    return {k: v for k, v in manifest.items() if k not in ("previous", "result")} | {"features": []}


def profile() -> Iterator[Entry]:
    """SPEC 3.3, 3.4, 3.9, 3.10, 4.1."""
    simple = one(full("v", (3,)), sign("s", (3, 9)))
    yield bad("feature-twice", "E205 E204", "3.3", build(CHAIN, manifest=put("features", to=["exact", "exact"])), ())
    yield bad("feature-among-unknown", "E204", "3.3", build(CHAIN, manifest=put("features", to=["exact", "x-a"])), ())
    yield bad("feature-upper-case", "E204", "3.3", build(CHAIN, manifest=put("features", to=["Exact"])), ())
    yield bad("feature-not-named", "E209 E205", "3.9", build(CHAIN, manifest=plain), ())
    for key in ("previous", "result"):
        yield bad(f"{key}-without-feature", "E205", "3.4", build(simple, manifest=put(key, to=None)), ())
        yield bad(f"{key}-missing", "E205", "3.4", build(CHAIN, digested=removed(key)))
        for slug, value in (("number", 1), ("bare", "5a" * 32), ("upper-case", "sha256:" + "5A" * 32), ("empty", "")):
            yield bad(f"{key}-{slug}", "E205", "3.4", build(CHAIN, digested=put(key, to=value)))
    for index, kind in ((1, "full"), (2, "same")):
        yield bad(f"size-beside-{kind}", "E205", "3.4", build(CHAIN, manifest=of_module(index, size=10)))
    mixed = one(GOOD, sign("s", (3, 9)))
    yield bad("size-beside-sign", "E205", "3.4", build(mixed, manifest=of_module(1, size=10)))
    yield bad("size-missing", "E205", "3.4", build(CHAIN, manifest=removed("modules", 0, "size")))
    components = of_module(0, components=[["row", 0]])
    yield bad("components-beside", "E205", "3.4", build(CHAIN, manifest=components))
    sizes: tuple[tuple[str, Any], ...] = (("text", "7"), ("negative", -1), ("true", True), ("null", None))
    for slug, value in sizes:
        yield bad(f"size-{slug}", "E205", "3.4", build(CHAIN, manifest=of_module(0, size=value)))
    empty = dataclasses.replace(GOOD, data=b"", index=(0,))
    yield bad("size-0", "E209", "3.9", build(one(empty)))
    for dtype in ("I16", "U8", "F64", "F8_E4M3", "BOOL"):
        typed = dataclasses.replace(GOOD, dtype=dtype, base=dataclasses.replace(held(GOOD), dtype=dtype))
        yield bad(f"of-{dtype.lower().replace('_', '-')}", "E209", "3.9", build(one(typed)))
    for dtype in ("F16", "F32", "I16"):
        other = dataclasses.replace(GOOD, base=dataclasses.replace(held(GOOD), dtype=dtype))
        yield bad(f"on-{dtype.lower()}", "E209", "3.9", build(one(other)))
    yield bad("no-base", "E209", "3.9", build(one(dataclasses.replace(GOOD, base=None))))
    for slug, shape in (("columns", (20, 29)), ("rank", (20, 30, 1)), ("flat", (600,)), ("transposed", (30, 20))):
        other = dataclasses.replace(GOOD, base=dataclasses.replace(held(GOOD), shape=shape))
        yield bad(f"base-{slug}", "E209", "3.10", build(one(other)))
    yield from tensors()
    yield bad("order-feature-before-size", "E204", "3.3", build(one(empty), manifest=put("features", to=["x-a"])), ())


def held(module: Module) -> Base:
    if module.base is None:
        raise ValueError(f"{module.name} has no base")
    return module.base


def tensors() -> Iterator[Entry]:
    """SPEC 4.1 and 4.2: index of 4 bytes at 0, data at 64."""
    size = len(GOOD.data)
    whole = 64 + size + -size % 64
    for slug, claimed in (("size-of-64-more", size + 64), ("size-of-64-less", size - 64), ("size-of-2-52", 2**52)):
        yield bad(slug, "E212 E208", "4.1", build(CHAIN, manifest=of_module(0, size=claimed)))
    for slug, changes in (
        ("name", {"name": "w.exact"}),
        ("as-full", {"name": "w.full"}),
        ("dtype", {"dtype": "I8"}),
        ("longer", {"shape": (whole + 64,), "data": bytes(whole + 64)}),
        ("without-index", {"shape": (whole - 64,), "data": bytes(whole - 64)}),
    ):
        yield bad(f"tensor-{slug}", "E212", "4.1", build(CHAIN, tensors=retensor(0, **changes)))
    tailed = update("w", OLD, NEW, shape=(24, 30), rows=20)
    cut = 64 + len(tailed.data) + -len(tailed.data) % 64
    yield bad(
        "tensor-without-tail", "E212", "4.1", build(one(tailed), tensors=retensor(0, shape=(cut,), data=bytes(cut)))
    )


def digests() -> Iterator[Entry]:
    """SPEC 3.13, 3.14 and 4.3. Digests of CHAIN: base, tensor and result of w, tensor of the norm, base of the gate."""

    def listed(edit: Any) -> Any:
        return lambda manifest: {**manifest, "digests": table(edit(untabled(manifest["digests"])))}

    yield bad("digests-without-result", "E213", "3.13", build(CHAIN, manifest=listed(lambda d: [*d[:2], *d[3:]])))
    yield bad("digests-one-more", "E213", "3.13", build(CHAIN, manifest=listed(lambda d: [*d, d[0]])))
    yield bad("digest-of-tensor", "E301", "4.3", build(CHAIN, manifest=listed(lambda d: [d[0], d[2], d[1], *d[3:]])))
    yield bad("damaged-index", "E301", "4.3", build(CHAIN, data=bytes_at(0, b"\x01")))
    yield bad("damaged-data", "E301", "4.3", build(CHAIN, data=bytes_at(64, b"\xaa\x55")))
    for slug, offset in (("behind-index", 4), ("before-data", 63)):
        yield bad(f"gap-{slug}", "E304", "4.5", build(CHAIN, tensors=patched(0, offset, b"\x01")))
    yield bad("gap-behind-data", "E304", "4.5", build(CHAIN, tensors=patched(0, 64 + len(GOOD.data), b"\x01")))

    def claims(slug: str, content: Content, value: Any) -> Entry:
        def edit(manifest: dict[str, Any]) -> dict[str, Any]:
            return {**manifest, "result": value(manifest) if callable(value) else value}

        return bad(f"result-{slug}", "E214", "3.14", build(content, manifest=edit))

    def without(index: int) -> Any:
        def edit(manifest: dict[str, Any]) -> Any:
            held_ = untabled(manifest["digests"])
            modules = [m for i, m in enumerate(manifest["modules"]) if i != index]
            gone = {0: {0, 1, 2}, 1: {3}, 2: {4}}[index]
            return result_digest(
                {"modules": modules, "digests": table([d for i, d in enumerate(held_) if i not in gone])}
            )

        return edit

    yield claims("zeros", CHAIN, "sha256:" + "0" * 64)
    yield claims("null-though-known", CHAIN, None)
    yield claims("without-same", CHAIN, without(2))
    yield claims("without-full", CHAIN, without(1))
    yield claims("of-base", CHAIN, lambda m: result_digest({**m, "digests": swapped_result(m["digests"])}))
    yield claims("of-tensor", CHAIN, lambda m: result_digest({**m, "digests": swapped_result(m["digests"], 1)}))
    for slug, module in (
        ("sign", sign("s", (3, 9))),
        ("tail", same("t", (5, 2), base_rows=4)),
        ("fewer-rows", same("t", (4, 2), base_rows=5)),
        ("other-dtype", same("t", (4, 2), dtype="F32", base_dtype="BF16")),
    ):
        yield claims(f"though-unknown-{slug}", one(GOOD, module), "sha256:" + "ab" * 32)
    alone = one(full("v", (3,)), chained=True)
    yield claims("null-without-exact", alone, None)


def swapped_result(text: str, index: int = 0) -> str:
    """The table of CHAIN with another of its digests instead of w's result."""
    listed = untabled(text)
    return table([*listed[:2], listed[index], *listed[3:]])


def of_blocks(*blocks: Block, count: int = 600, dtype: str = "BF16") -> Content:
    """An `exact` module of these blocks over weights that do not matter."""
    weights = [0x3C00] * count
    return one(update("w", weights, weights, dtype=dtype, blocks=blocks))


def spaced(
    moves: int, places: Sequence[int], rest: bytes, *, signs: bytes | None = None, listed: int | None = None
) -> bytes:
    """A block of gaps of BF16 whose counts may be wrong; every new pattern is 0x3C00."""
    counts = words([moves, len(places) if listed is None else listed, *places])
    return counts + words([0x3C00] * len(places)) + (bytes(-(-moves // 8)) if signs is None else signs) + rest


def lengths() -> Iterator[Entry]:
    """SPEC 5.6 and 5.7."""
    nothing = (0, spaced(0, (), b""))

    def counted(slug: str, *entries: tuple[int, int], data: bytes, count: int = 600) -> Entry:
        module = of_blocks(*[(a, bytes(0)) for a, _ in entries], count=count).modules[0]
        index = tuple(length << 8 | a for a, length in entries)
        return bad(f"{slug}", "E307", "5.7", build(one(dataclasses.replace(module, index=index, data=data))))

    yield counted("sum-short", (0, 4), data=bytes(5))
    yield counted("sum-long", (0, 5), data=bytes(4))
    yield counted("sum-of-none", (0, 0), data=bytes(4))
    two = BLOCK + 300
    yield counted("sum-short-of-two", (0, 4), (0, 4), data=bytes(9), count=two)
    yield counted("sum-long-of-two", (0, 4), (0, 2**24 - 1), data=bytes(8), count=two)
    yield counted("patterns-short", (255, 1198), data=bytes(1198))
    yield counted("patterns-long", (255, 1202), data=bytes(1202))
    yield counted("patterns-none", (255, 0), (0, 4), data=bytes(4), count=two)
    yield counted("patterns-of-last-as-full", (0, 4), (255, 2 * BLOCK), data=bytes(2 * BLOCK + 4), count=two)
    for length in (1, 2, 3):
        yield counted(f"gaps-of-{length}", (0, length), data=bytes(length))
    yield counted("keyed-of-0", (120, 0), (0, 4), data=bytes(4), count=two)
    yield counted("keyed-as-long-as-patterns", (120, 1200), data=bytes(1200))
    yield counted("keyed-longer-than-patterns", (120, 1201), data=bytes(1201))
    yield counted("keyed-last-as-long-as-patterns", (0, 4), (120, 600), data=bytes(604), count=two)
    many = spaced(0, tuple(range(299)), b"")
    yield bad("gaps-as-long-as-patterns", "E307", "5.7", build(of_blocks((0, many), count=600)))
    for slug, places in (("descend", (5, 4)), ("twice", (5, 5)), ("beyond", (3, 600)), ("far-beyond", (3, 65_535))):
        yield bad(f"gaps-places-{slug}", "E307", "5.7", build(of_blocks((0, spaced(0, places, b"")))))
        fields = [field for place in places for field in ((place, 16), (0x3C00, 16))]
        block = packed([len(places), 0], fields)
        yield bad(f"keyed-places-{slug}", "E307", "5.7", build(of_blocks((60, block))))
    yield bad(
        "gaps-place-beyond-last", "E307", "5.7", build(of_blocks(nothing, (0, spaced(0, (300,), b"")), count=two))
    )
    keyed_last = (60, packed([1, 0], [(300, 16), (0x3C00, 16)]))
    yield bad("keyed-place-beyond-last", "E307", "5.7", build(of_blocks(nothing, keyed_last, count=two)))
    for slug, places in (("first", (0, 9)), ("last", (2, 4)), ("middle", (1, 2))):
        both = spaced(3, places, bytes((0, 1, 1)))  # moves at 0, 2 and 4
        yield bad(f"move-is-exception-{slug}", "E307", "5.7", build(of_blocks((0, both))))
    for slug, data in (
        ("ones", b"\xff" * 40),
        ("too-many", packed([40], [(1, 16), (0x3C00, 16)])),
        ("one-too-many", packed([3, 0], [(1, 16), (0x3C00, 16), (2, 16), (0x3C00, 16)], between=0)),
    ):
        yield bad(f"keyed-exceptions-{slug}", "E307", "5.7", build(of_blocks((60, data))))
    for key in (1, 254):
        block = packed([2, 0], [(5, 16), (0x3C00, 16), (4, 16), (0x3C00, 16)])
        yield bad(f"keyed-{key}-places-descend", "E307", "5.7", build(of_blocks((key, block))))
    yield bad("moves-beyond", "E307", "5.7", build(of_blocks((0, spaced(2, (), bytes((255, 255, 89, 0)))))))
    yield bad("move-beyond", "E307", "5.7", build(of_blocks((0, spaced(1, (), words([600]))), count=600)))
    yield bad("moves-far-beyond", "E307", "5.7", build(of_blocks((0, spaced(1, (), words([65_535]))), count=600)))
    yield bad(
        "moves-beyond-first",
        "E307",
        "5.7",
        build(of_blocks((0, spaced(2, (), bytes(words([65_535, 0])))), nothing, count=two)),
    )


def gap_blocks() -> Iterator[Entry]:
    """SPEC 5.8. 600 weights: one move has a gap of 16 bits, two and more have gaps of bytes."""
    for slug, block in (
        ("rest-missing", spaced(2, (), b"")),
        ("rest-short", spaced(3, (), bytes(2))),
        ("rest-long", spaced(3, (), bytes(4))),
        ("rest-without-moves", spaced(0, (), bytes(1))),
        ("rest-open", spaced(2, (), bytes((3, 255)))),
        ("rest-open-behind", spaced(2, (), bytes((3, 4, 255)))),
        ("words-as-bytes", spaced(2, (), words([3, 4]))),
        ("bytes-as-words", spaced(1, (), bytes((3,)))),
        ("words-long", spaced(1, (), words([3, 4]))),
        ("unused-sign", spaced(3, (), bytes(3), signs=b"\x08")),
        ("unused-sign-last", spaced(3, (), bytes(3), signs=b"\x80")),
        ("unused-sign-second-byte", spaced(9, (), bytes(9), signs=b"\x01\x02")),
        ("signs-missing", spaced(3, (), b"", signs=b"")),
        ("moves-more-than-there", spaced(600, (), bytes(60))),
        ("moves-more-than-weights", spaced(601, (), bytes(601))),
        ("exceptions-more-than-there", spaced(0, (1, 2), b"", listed=3)),
        ("exceptions-fewer-than-there", spaced(0, (1, 2), b"", listed=1)),
        ("exceptions-65535", spaced(0, (), bytes(8), listed=65_535)),
    ):
        yield bad(f"gaps-{slug}", "E307", "5.8", build(of_blocks((0, block))))
    wide = words([0, 1, 3]) + words([0x3C00])
    yield bad("gaps-pattern-short-f32", "E307", "5.8", build(of_blocks((0, wide), dtype="F32")))
    good = of_blocks((60, packed([0, 0], [])))
    damaged = build(good, tensors=patched(0, 6, b"\x01"))
    yield bad("order-gap-before-block", "E304", "4.5", damaged)


def refused_updates() -> Iterator[Entry]:
    """Every case of `decode`."""
    for group in (profile, digests, lengths, gap_blocks):
        yield from group()


def rejected(slug: str, codes: str, clause: str, content: Content, base: bytes | None = None, **hooks: Any) -> Entry:
    """An apply case; base: replaces the content's own."""
    files = {"file": build(content, **hooks), "base": base or apply(content)[0]}
    codes_ = tuple(codes.split())
    return Entry(
        id=f"exact-{slug}",
        clause=clause,
        operation="apply",
        phase=PHASES[codes[1]],
        codes=codes_,
        files=files,
        features=EXACT,
    )


def refused_bindings() -> Iterator[Entry]:
    """SPEC 7.3 and 7.4: another base, another result, bits that cannot be read or are not all read."""
    other = dataclasses.replace(GOOD, new=GOOD.new[:-1] + bytes((GOOD.new[-1] ^ 1,)))
    yield rejected("result-other", "E405", "7.4", one(other))
    swapped = dataclasses.replace(GOOD, new=words(OLD))
    yield rejected("result-is-base", "E405", "7.4", one(swapped))
    tailed = update("w", OLD, NEW, shape=(24, 30), rows=20)
    covered = build(
        one(tailed), manifest=lambda m: {**m, "digests": table([*untabled(m["digests"])[:2], digest(tailed.new)])}
    )
    yield dataclasses.replace(
        rejected("result-of-covered-only", "E405", "7.4", one(tailed)),
        files={"file": covered, "base": apply(one(tailed))[0]},
    )
    stored = update("w", OLD, NEW, blocks=[(255, words(OLD))])
    yield rejected("result-of-patterns", "E405", "7.4", one(stored))
    second = one(GOOD, update("v", OLD, OLD, blocks=[(121, GOOD.data)]))
    yield rejected("result-second-module", "E405", "7.4", second)
    unary, fields = numbers(OLD, NEW, FORM, 121)
    least = -(sum(unary) + len(unary) + sum(bits for _, bits in fields)) % 8
    last, still = unary[-1], unary[:-1]
    wrong = {
        "zeros-of-a-byte": packed(unary, fields, between=least + 8),
        "zeros-of-two-bytes": packed(unary, fields, between=least + 16),
        "bit-between": packed(unary, [*fields, (1, 1)]),
        "last-run-longer": packed([*still, last + 1], fields),
        "last-run-shorter": packed([*still, max(last - 1, 0)], fields),
        "unary-missing": packed(still, fields),
        "field-missing": packed(unary, fields[:-1]),
        "field-more": packed(unary, [*fields, (0, 9)]),
        "unary-more": packed([*unary, 1], fields),
        "one-byte-cut": packed(unary, fields)[1:],
        "only-zeros": bytes(40),
        "quotient-9": packed([unary[0], 9, *unary[2:]], fields),
    }
    for slug, data in wrong.items():
        module = update("w", OLD, NEW, shape=(20, 30), blocks=[(121, data)])
        yield rejected(f"bits-{slug}", "E405", "7.4", one(module))
    ended = list(NEW)  # the last weight of the last class moves
    last_place = max(i for i, word in enumerate(OLD) if FORM.exponent(word) == 125)
    ended[last_place] = moved(OLD[last_place], 1, FORM)
    unary, fields = numbers(OLD, ended, FORM, 121)
    longer = update("w", OLD, ended, shape=(20, 30), blocks=[(121, packed([*unary[:-1], unary[-1] + 1], fields))])
    yield rejected("bits-last-run-of-1-for-0", "E405", "7.4", one(longer))
    nine = [0x3F80] + [0x4600] * 20
    lax = update("w", nine, [moved(0x3F80, -5, FORM), *nine[1:]], blocks=[(128, packed([0, 9, 1], []))])
    yield rejected("bits-quotient-9-as-number", "E405", "7.4", one(lax))
    eight = update("w", nine, [0x3F82, *nine[1:]], blocks=[(128, packed([0, 4, 1], [], between=8))])
    yield rejected("bits-zeros-8", "E405", "7.4", one(eight))
    for key in (120, 122, 1):
        yield rejected(f"bits-of-key-{key}", "E405", "7.4", one(update("w", OLD, NEW, blocks=[(key, GOOD.data)])))
    third = changed("third", "BF16", NEW, 5)
    first = apply(one(GOOD))[0]
    after = one(update("w", NEW, third, shape=(20, 30)), previous="sha256:" + "5a" * 32)
    yield rejected("chain-update-left-out", "E404", "7.3", after, first)
    yield rejected("chain-taken-twice", "E404", "7.3", one(GOOD), apply(one(GOOD))[1])
    yield rejected("order-base-before-result", "E404", "7.3", one(other), apply(after)[0])
