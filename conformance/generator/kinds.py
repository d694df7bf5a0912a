"""Allowed but rare content: large rows and payloads, odd bases, names with quotes and dots, exact limits.

Each case covers a kind of mistake: an index of 8 or 16 bits, a chunk that ends in a row, a base that is assumed to be
aligned or in order, names that are not compared by their bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .binding import base_of, rejected
from .build import build, expected, safetensors
from .content import Asset, Base, Content, Module, full, noise, same, sign
from .entry import Entry, refused
from .faults import bytes_at, put, replaced
from .rebuild import apply
from .roundings import accepted
from .samples import SIMPLE, WHOLE
from .valid import simple

__all__ = ["applied_kinds", "golden_kinds", "refused_kinds"]

TEXT_LIMIT = 2**16
# Code points where the length of a character changes, in UTF-8 or in UTF-16, and neighbours of noncharacters.
EDGES = (0x20, 0x7E, 0x7F, 0x80, 0xBF, 0xC0, 0x7BF, 0x7C0, 0x7FF, 0x800, 0xFFF, 0x1000, 0xCFFF, 0xD000, 0xD7FF, 0xE000,
         0xEFFF, 0xF000, 0xFFFD, 0xFFFF, 0x10000, 0x3FFFF, 0x40000, 0xFFFFF, 0x100000, 0x10FFFF)  # fmt: skip


def sizes() -> Iterator[tuple[str, Content]]:
    """Rows of more than 255 bytes, more rows and columns than 255, more bytes than 16 and 19 bits count."""
    yield "wide", Content(modules=(sign("w", (2, 2101), ("row+col",)), sign("v", (1, 4100), ("col",))))
    yield "tall", Content(modules=(sign("w", (301, 9), ("row",)), sign("v", (1030, 2), ("row+col",))))
    yield "batches", Content(modules=(sign("w", (260, 2, 9), ("row+col",)), sign("v", (3, 70, 5), ("col",))))
    yield "tail-wide", Content(modules=(sign("w", (4, 700), base_rows=3), same("v", (300, 3), base_rows=290)))
    long = full("w", (70_001,), dtype="U8", exact=noise("long", 70_001))
    yield "more-than-64-kib", Content(modules=(long, full("v", (3,))))
    asset = Asset(path="tokenizer.json", data=noise("asset", 70_001))
    yield "asset-of-64-kib", simple(assets=(asset, Asset(path="z.json", data=b"z")))


def named() -> Content:
    """Names whose order by bytes is neither that of letters nor of their words, in another order in the file."""
    names = ["a.b", "a-b", 'a"b', "aB", "ab", "a_b", "Z", "~", "a.10", "a.9", "a", "a.", '"', ".", "'", "a.b.c"]
    return Content(modules=tuple(same(name, (2,)) for name in names))


def decoded_kinds() -> Iterator[tuple[str, str, Content]]:
    """(slug, clause, content) of files that every reader accepts."""
    for slug, content in sizes():
        yield f"size-{slug}", "4.1", content
    whole = full("w", (600_001,), dtype="U8", exact=noise("chunks", 600_001))
    yield "size-more-than-512-kib", "4.3", Content(modules=(whole,))
    yield "names-by-bytes", "3.11", named()
    yield "utf8-edges", "2.7", simple(metadata={"".join(map(chr, EDGES)): "".join(map(chr, reversed(EDGES)))})
    yield "utf16-edges", "3.2", simple(metadata=dict.fromkeys(map(chr, EDGES), ""))
    yield "texts-of-65536-bytes", "3.8", texts_at_limit()
    yield "dtypes-written-out", "3.4", dtypes()
    yield "zeros-beside-numbers", "2.10", Content(modules=WHOLE.modules, calibration={**calibration(), "seed": 0})


def calibration() -> dict[str, Any]:
    return dict(WHOLE.calibration or {})


def texts_at_limit() -> Content:
    """`base`, `fine_tuned`, `producer` and `calibration` of 2^16 bytes each, their keys included."""

    def fill(rest: str) -> str:
        return "x" * (TEXT_LIMIT - len(rest))

    digest = "0" * 71
    empty = {**calibration(), "source": ""}
    return Content(
        modules=(full("w", (1,)),),
        base=(fill(f'{{"digest":"{digest}","id":"","revision":null}}'), None),
        fine_tuned=("", fill('{"id":"","revision":""}')),
        producer=(fill('{"name":"","version":""}'), ""),
        calibration={**empty, "source": fill(canonical_of(empty))},
    )


def canonical_of(value: dict[str, Any]) -> str:
    return "{" + ",".join(f'"{k}":{v if isinstance(v, int) else chr(34) + v + chr(34)}' for k, v in value.items()) + "}"


def dtypes() -> Content:
    """Every way to leave out or write out dtype and base: (module's, base's) of the same and of another kind."""
    pairs = (("BF16", "BF16"), ("BF16", "F32"), ("F32", "BF16"), ("F32", "F32"), ("F16", "F16"))
    made: list[Module] = []
    for i, (dtype, base) in enumerate(pairs):
        made += [sign(f"s{i}", (2, 9), dtype=dtype, base_dtype=base), same(f"t{i}", (3,), dtype=dtype, base_dtype=base)]
    other = Base(dtype="BF16", shape=(5,), data=b"0123456789")
    made += [full("new", (2,)), full("like", (5,), base=other), full("longer", (6,), base=other)]
    return Content(modules=tuple(made))


def bases() -> Iterator[tuple[str, bytes, bytes, bytes]]:
    """(slug, file, base, output) of bases with an unusual file."""
    content = Content(modules=(sign("q", (3, 9)), same("k", (4, 3)), full("n", (5,)), same("t", (5, 2), base_rows=4)))
    file, (_, output) = build(content), apply(content)
    held = base_of(content)
    yield "header-not-aligned", file, safetensors(held, metadata="p", align=1), output
    yield "header-one-off", file, safetensors(held, metadata="pt", align=1), output
    yield "no-metadata", file, safetensors(held), output
    yield "header-spaces", file, safetensors(held, metadata="pt", align=4096), output
    yield "data-not-in-order", file, safetensors(held, metadata="pt", order=sorted(held, reverse=True)), output
    beside: dict[str, Any] = {
        "empty": ("F32", (0,), b""),
        "a": ("BOOL", (1,), b"\1"),
        "number": ("I64", (), bytes(8)),
        "q.0.mask": ("U8", (1,), b"x"),
        "q.delta": ("U8", (64,), bytes(64)),
        "n": ("U8", (1,), b"n"),
        "nine": ("U8", (1,) * 9, b"9"),
        'quo"te\\': ("U8", (1,), b"q"),
        "na\u00efve": ("U8", (1,), b"i"),
    }
    yield "odd-tensors-beside", file, safetensors({**beside, **held}, metadata="pt"), output
    yield "more-behind", file, safetensors({**held, **beside}, metadata="pt"), output


def applied_kinds() -> Iterator[Entry]:
    """Files that every loader applies to their base."""
    for slug, content in sizes():
        yield accepted(f"size-{slug}", "5.1", content)
    yield accepted("names-by-bytes", "7.1", named())
    yield accepted("dtypes-written-out", "6.1", dtypes())
    for slug, file, base, output in bases():
        files = {"file": file, "base": base, "output": output}
        yield Entry(id=f"base-{slug}", clause="7.1", operation="apply", files=files)
    aliased = simple(tied=(("model.norm.weight", "alias"),), dropped=("gone",))
    base, output = apply(aliased)
    held = {**base_of(aliased), "alias": ("U8", (1,), b"x"), "gone": ("F32", (2,), bytes(8))}
    files = {"file": build(aliased), "base": safetensors(held, metadata="pt"), "output": output}
    yield Entry(id="base-holds-alias-and-dropped", clause="7.1", operation="apply", files=files)
    cube = Content(modules=(sign("q", (2, 3, 9), ("row+col",)), same("k", (4, 3, 2))))
    good = base_of(cube)
    for name, shapes in (("q", ((3, 2, 9), (2, 9, 3), (9, 3, 2), (6, 9), (2, 27))), ("k", ((3, 4, 2), (4, 2, 3)))):
        for shape in shapes:
            slug = f"base-permuted-{name}-{'-'.join(map(str, shape))}"
            yield rejected(slug, "E403", "7.2", cube, {**good, name: ("BF16", shape, good[name][2])})
    assets = simple(assets=(Asset(path="a.json", data=b"{}"), Asset(path="b.json", data=b"[]")))
    for slug, offset in (("first", 192), ("second", 256)):
        yield rejected(
            f"apply-damaged-asset-{slug}", "E302", "4.4", assets, base_of(assets), data=bytes_at(offset, b"!")
        )


def refused_kinds() -> Iterator[Entry]:
    """One step beyond the limits."""
    for slug, rank in (
        ("other-order", (2, 9, 3)),
        ("flat", (6, 9)),
        ("split", (2, 3, 3, 3)),
        ("rows-of-batch", (2, 2, 9)),
    ):
        size = 2
        for dimension in rank:
            size *= dimension
        module = Module(
            name="w",
            dtype="BF16",
            shape=(2, 3, 9),
            encoding="same",
            base=Base(dtype="BF16", shape=rank, data=bytes(size)),
        )
        yield refused(f"fit-same-base-{slug}", "E209", "3.10", build(Content(modules=(module,))))
    limit = texts_at_limit()
    for key, path in (
        ("base", ("base", "id")),
        ("fine_tuned", ("fine_tuned", "revision")),
        ("producer", ("producer", "name")),
        ("calibration", ("calibration", "source")),
    ):
        text = {"base": limit.base[0], "fine_tuned": limit.fine_tuned[1], "producer": limit.producer[0]}.get(key)
        longer = (text or str((limit.calibration or {})["source"])) + "x"
        file = build(limit, manifest=put(*path, to=longer))
        yield refused(f"text-of-65537-bytes-{key.replace('_', '-')}", "E208", "3.8", file)
    for slug, number in (
        ("plus", "+3"),
        ("leading-zero", "-03"),
        ("point", "-3.0"),
        ("power", "-3e0"),
        ("beyond-2-53", "9007199254740992"),
        ("below-2-53", "-9007199254740992"),
        ("of-64-bits", "18446744073709551613"),
        ("minus", "-"),
        ("hexadecimal", "0x3"),
    ):
        file = build(SIMPLE, text=replaced('["row",-3]', f'["row",{number}]'))
        yield refused(f"manifest-exponent-{slug}", "E202 E205", "3.1", file)
    for slug, number in (("beyond-2-53", "9007199254740992"), ("point", "0.0"), ("leading-zero", "00")):
        file = build(WHOLE, text=replaced('"seed":0', f'"seed":{number}'))
        yield refused(f"manifest-seed-{slug}", "E202 E205", "3.1", file)
    for slug, number in (("beyond-2-53", "9007199254740992"), ("minus-zero", "-0")):
        file = build(SIMPLE, text=replaced('"shape":[5]', f'"shape":[{number}]'))
        codes = ("E203 E205", "3.2") if slug == "minus-zero" else ("E202 E205", "3.1")
        yield refused(f"manifest-shape-{slug}", *codes, file)


def golden_kinds() -> Iterator[Entry]:
    """`decoded_kinds` as cases."""
    for slug, clause, content in decoded_kinds():
        file = build(content)
        yield Entry(id=slug, clause=clause, files={"file": file}, expect=expected(content, file))
