"""Apply cases: file, base and the expected fine-tuned checkpoint, bit for bit (SPEC 6 and 7)."""

from __future__ import annotations

from collections.abc import Iterator

from .binding import base_of, bindings
from .build import build, safetensors
from .content import Base, Content, component, full, noise, same, sign, words
from .entry import Entry
from .rebuild import apply
from .roundings import accepted, roundings
from .valid import example, simple

__all__ = ["applied"]

SIZE = {"BF16": 2, "F16": 2, "F32": 4}


def layout() -> Iterator[Entry]:
    """SPEC 5: the scale and the bit of each weight."""
    for axis in ("row", "col", "row+col", "tensor"):
        slug = axis.replace("+", "-")
        for shape, word in (
            ((3, 11), "wide"),
            ((11, 3), "tall"),
            ((8, 8), "square"),
            ((2, 3, 9), "batch"),
            ((2, 2, 2, 3), "batch-of-two"),
            ((1, 1), "one"),
        ):
            yield accepted(f"axis-{slug}-{word}", "5.3", Content(modules=(sign("w", shape, (axis,)),)))
    for exponent in (-64, -30, -1, 1, 30, 63):
        yield accepted(
            f"exponent-{exponent}",
            "5.3",
            Content(modules=(sign("w", (2, 9), ("row",), dtype="F32", exponent=exponent),)),
        )
        yield accepted(
            f"exponent-{exponent}-row-col",
            "5.3",
            Content(modules=(sign("w", (2, 9), ("row+col",), dtype="F32", exponent=exponent),)),
        )
    for width in (1, 7, 8, 9, 16, 17, 65):
        yield accepted(f"bits-{width}", "5.1", Content(modules=(sign("w", (2, width), ("col",)),)))
    yield accepted(
        "eight-components",
        "6.1",
        Content(
            modules=(
                sign("w", (3, 9), ("row", "col", "row+col", "tensor", "col", "row", "tensor", "row+col"), dtype="F32"),
            )
        ),
    )
    yield accepted("everything", "6.1", example())


def dtypes() -> Iterator[Entry]:
    """Each module dtype on each base dtype, over every kind of number, by `sign` and by `same`."""
    for dtype in SIZE:
        for base_dtype, size in SIZE.items():
            specials = {
                "F16": [
                    0,
                    0x8000,
                    1,
                    0x8001,
                    0x3FF,
                    0x400,
                    0x7BFF,
                    0xFBFF,
                    0x7C00,
                    0xFC00,
                    0x7E00,
                    0x7C01,
                    0xFE01,
                    0x3555,
                ],
                "BF16": [
                    0,
                    0x8000,
                    1,
                    0x8001,
                    0x7F,
                    0x80,
                    0x7F7F,
                    0xFF7F,
                    0x7F80,
                    0xFF80,
                    0x7FC0,
                    0x7F81,
                    0xFFC1,
                    0x477F,
                    0x4780,
                    0x3300,
                    0x3380,
                ],
                "F32": [
                    0,
                    0x80000000,
                    1,
                    0x80000001,
                    0x7FFFFF,
                    0x800000,
                    0x7F7FFFFF,
                    0xFF7FFFFF,
                    0x7F800000,
                    0xFF800000,
                    0x7FC00000,
                    0x7F800001,
                    0xFFC12345,
                    0x3F808000,
                    0x3F818000,
                    0x3F808001,
                    0x3F807FFF,
                    0x3F801000,
                    0x3F803000,
                    0x3F801001,
                    0x477FE000,
                    0x477FEFFF,
                    0x477FF000,
                    0x7F7F8000,
                    0x7F7F7FFF,
                    0x33000000,
                    0x33000001,
                    0x33800000,
                    0x387FE000,
                    0x387FF000,
                    0x00008000,
                    0x00018000,
                    0x00007FFF,
                ],
            }[base_dtype]
            raw = words(specials, size) + noise(f"bits {dtype} {base_dtype}", size * 60)
            count = len(raw) // size
            slug = f"{dtype}-on-{base_dtype}".lower()
            yield accepted(
                f"same-{slug}",
                "6.3",
                Content(modules=(same("w", (count,), dtype=dtype, base_dtype=base_dtype, base=raw),)),
            )
            for word, bits, exponent in (
                ("zero", 0, 0),
                ("tiny", 1, -64),
                ("small", 0x3C01, -12),
                ("large", 0x7BFF, 63),
            ):
                part = component(f"{slug} {word}", (1, count), "tensor", exponent, scalar=(bits,))
                yield accepted(
                    f"sign-{slug}-{word}",
                    "6.1",
                    Content(
                        modules=(
                            sign("w", (1, count), dtype=dtype, base_dtype=base_dtype, base=raw, components=(part,)),
                        )
                    ),
                )
    for dtype in ("I8", "F64", "BOOL", "F8_E4M3"):
        yield accepted(
            f"same-{dtype.lower().replace('_', '-')}",
            "6.3",
            Content(
                modules=(
                    same(
                        "w",
                        (4,),
                        dtype=dtype,
                        base=noise("w", {"F64": 32}.get(dtype, 4)) if dtype != "BOOL" else b"\1\0\1\1",
                    ),
                )
            ),
        )


def shapes() -> Iterator[Entry]:
    """SPEC 6.3 to 6.5: tails, fewer rows, aliases, dropped tensors."""
    yield accepted("tail-sign", "6.4", Content(modules=(sign("w", (5, 9), ("row", "col"), base_rows=3),)))
    yield accepted("tail-sign-batch", "6.4", Content(modules=(sign("w", (3, 2, 5), ("row+col",), base_rows=2),)))
    yield accepted("tail-same", "6.4", Content(modules=(same("w", (5, 3), base_rows=4), same("v", (4,), base_rows=1))))
    yield accepted(
        "tail-same-other-dtype",
        "6.3",
        Content(modules=(same("w", (5, 3), dtype="F32", base_dtype="BF16", base_rows=4),)),
    )
    yield accepted("fewer-rows-sign", "6.1", Content(modules=(sign("w", (2, 9), ("row+col",), base_rows=4),)))
    yield accepted("fewer-rows-sign-batch", "6.1", Content(modules=(sign("w", (1, 2, 9), ("col",), base_rows=3),)))
    yield accepted(
        "fewer-rows-same",
        "6.3",
        Content(modules=(same("w", (2, 3), base_rows=4), same("v", (1,), dtype="I64", base_rows=2))),
    )
    yield accepted(
        "fewer-rows-same-other-dtype",
        "6.3",
        Content(modules=(same("w", (2, 3), dtype="F16", base_dtype="F32", base_rows=4),)),
    )
    yield accepted(
        "no-dimensions",
        "6.3",
        Content(modules=(same("a", (), dtype="F32", base_dtype="BF16"), full("b", (), dtype="I64"))),
    )
    yield accepted(
        "full-other-base",
        "6.4",
        Content(modules=(full("w", (2, 3), base=Base(dtype="I8", shape=(4, 1), data=b"\1\2\3\4")),)),
    )
    yield accepted("all-new", "7.1", Content(modules=(full("a", (2, 3)), full("b", (1,), dtype="F64"))))
    yield accepted(
        "tied",
        "6.5",
        simple(
            tied=(("model.norm.weight", "A"), ("model.q_proj.weight", "lm_head.weight"), ("model.norm.weight", "z"))
        ),
    )
    yield accepted("dropped", "6.5", simple(dropped=("old.bias", "old.weight")))
    content = simple()
    base, output = apply(content)
    more = safetensors({"unused": ("F32", (2,), bytes(8)), **base_of(content), "model.norm.weight": ("U8", (1,), b"x")})
    yield Entry(
        id="base-with-more-tensors",
        clause="7.1",
        operation="apply",
        files={"file": build(content), "base": more, "output": output},
    )
    foreign = {"unused": ("F9_NEW", (3,), b"abcde"), **base_of(content), "none": ("F12", (0, 2), b"")}
    yield Entry(
        id="base-with-unknown-dtypes",
        clause="7.1",
        operation="apply",
        files={"file": build(content), "base": safetensors(foreign), "output": output},
        note="tensors that the manifest does not name may have dtypes that the format does not know",
    )
    yield Entry(
        id="dropped-is-not-in-base",
        clause="6.5",
        operation="apply",
        files={"file": build(simple(dropped=("absent",))), "base": base, "output": output},
        note="nothing asks for the tensors that are dropped",
    )


def applied() -> Iterator[Entry]:
    """Every case of this module."""
    for group in (layout, dtypes, roundings, shapes, bindings):
        yield from group()
