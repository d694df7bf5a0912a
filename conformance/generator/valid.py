"""Files that every reader must accept: layout, edges, limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .build import build
from .content import BITS, Asset, Base, Content, component, full, noise, same, sign

__all__ = ["contents", "example", "padded_to", "simple"]

Case = tuple[str, str, Content]


def simple(**changes: Any) -> Content:
    """One sign module of three rows and eleven columns, and a norm; most faults are planted in it."""
    fields: dict[str, Any] = {"modules": (sign("model.q_proj.weight", (3, 11)), full("model.norm.weight", (5,)))}
    return Content(**{**fields, **changes})


def example() -> Content:
    """A small file with one of everything."""
    return Content(
        modules=(
            sign("model.embed_tokens.weight", (7, 9), ("row",), base_rows=5),
            full("model.layers.0.input_layernorm.weight", (9,), dtype="F32"),
            sign("model.layers.0.self_attn.q_proj.weight", (6, 9), ("row", "col")),
            sign("model.layers.0.mlp.experts.weight", (2, 3, 9), ("row+col",), dtype="F16", base_dtype="F32"),
            same("model.layers.0.mlp.gate.weight", (4, 9)),
            sign("model.norm.weight", (1, 9), ("tensor",), dtype="F32", base_dtype="BF16"),
        ),
        tied=(("model.embed_tokens.weight", "lm_head.weight"),),
        dropped=("model.layers.1.bias", "model.vision.weight"),
        assets=(
            Asset(path="config.json", data=b'{"model_type":"example"}\n'),
            Asset(path="chat_template.jinja", data=b"{{ messages }}"),
        ),
        metadata={"peraxis.plan": "row", "licence": "Apache-2.0"},
        calibration={
            "digest": "sha256:" + "ab" * 32,
            "samples": 50,
            "seed": 0,
            "sequence_length": 128,
            "source": "wikitext",
        },
    )


def layout() -> Iterator[Case]:
    yield "minimal", "2.3", Content(modules=(full("w", (1,), dtype="U8", exact=b"\x07"),))
    yield "everything", "4.1", example()
    yield "simple", "4.1", simple()
    for axis in ("row", "col", "row+col", "tensor"):
        slug = axis.replace("+", "-")
        yield f"axis-{slug}", "5.3", Content(modules=(sign("w", (5, 13), (axis,)),))
        yield f"axis-{slug}-batch", "5.3", Content(modules=(sign("w", (2, 3, 10), (axis,)),))
        yield f"axis-{slug}-1x1", "5.3", Content(modules=(sign("w", (1, 1), (axis,)),))
    for width in (1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65):
        yield f"width-{width}", "5.1", Content(modules=(sign("w", (3, width), ("row",)),))
    yield "batch-of-two", "5.1", Content(modules=(sign("w", (2, 2, 3, 9), ("row+col",)),))
    yield "signs-all-plus", "5.1", Content(modules=(one_component("w", (3, 12), signs=b"\x01" * 36),))
    yield "signs-all-minus", "5.1", Content(modules=(one_component("w", (3, 12), signs=b"\x00" * 36),))
    yield "signs-one-plus", "5.1", Content(modules=(one_component("w", (2, 16), signs=b"\x01" + b"\x00" * 31),))
    yield "no-pad-needed", "4.2", Content(modules=(sign("w", (32, 16)), full("v", (64,), dtype="U8")))
    yield "pad-of-63", "4.2", Content(modules=(full("a", (65,), dtype="U8"), full("b", (1,), dtype="U8")))
    yield "pad-of-1", "4.2", Content(modules=(full("a", (63,), dtype="U8"), full("b", (2,), dtype="U8")))
    yield "twelve-pads", "4.2", Content(modules=tuple(full(f"m{i}", (3,), dtype="U8") for i in range(13)))
    yield "no-data", "4.1", Content(modules=(same("w", (3, 4)), same("v", (4,))))
    yield (
        "execution-order",
        "3.7",
        Content(modules=(full("z", (2,)), sign("b", (2, 9)), full("a", (2,)), same("c", (2,)))),
    )


def one_component(name: str, shape: tuple[int, ...], axis: str = "row", exponent: int = 0, **given: Any) -> Any:
    part = component(name, shape, axis, exponent, **given)
    return sign(name, shape, components=(part,))


def numbers() -> Iterator[Case]:
    for exponent in (-64, -1, 0, 63):
        yield f"exponent-{exponent}", "3.9", Content(modules=(sign("w", (2, 9), ("row",), exponent=exponent),))
    for slug, bits in (("zero", 0), ("smallest", 1), ("subnormal", 0x3FF), ("normal", 0x400), ("largest", 0x7BFF)):
        parts = tuple(
            component(f"w{k}", (2, 9), axis, 0, **{word: (bits,) * n})
            for k, (axis, word, n) in enumerate((("row", "row", 2), ("col", "col", 9), ("tensor", "scalar", 1)))
        )
        yield f"scale-{slug}", "5.4", Content(modules=(sign("w", (2, 9), components=parts),))
    yield (
        "scales-mixed",
        "5.4",
        Content(modules=(one_component("w", (6, 9), row=(0, 1, 0x3FF, 0x400, 0x3C00, 0x7BFF)),)),
    )
    axes = ("row", "col", "row+col", "tensor", "col", "row", "tensor", "row+col")
    yield "eight-components", "3.8", Content(modules=(sign("w", (3, 9), axes),))
    yield "eight-dimensions", "3.8", Content(modules=(sign("w", (2, 1, 1, 2, 1, 1, 2, 9), ("row", "col")),))
    yield "eight-dimensions-full", "2.14", Content(modules=(full("w", (1, 1, 2, 1, 1, 1, 1, 3)),))


def encodings() -> Iterator[Case]:
    whole = [dtype for dtype, bits in BITS.items() if bits % 8 == 0]
    yield "full-every-dtype", "2.13", Content(modules=tuple(full(f"w.{d}", (3,), dtype=d) for d in whole))
    yield "same-every-dtype", "3.9", Content(modules=tuple(same(f"w.{d}", (3,), dtype=d) for d in whole))
    yield "full-no-dimensions", "2.14", Content(modules=(full("step", (), dtype="I64"),))
    yield "same-no-dimensions", "3.10", Content(modules=(same("step", (), dtype="I64"),))
    other = Base(dtype="I8", shape=(4, 1), data=b"\x01\x02\x03\x04")
    yield "full-other-base", "3.9", Content(modules=(full("w", (2, 3), base=other),))
    yield "all-new", "3.11", Content(modules=(full("a", (2, 3)), full("b", (1,), dtype="F64")))
    for dtype in ("BF16", "F16", "F32"):
        for base in ("BF16", "F16", "F32"):
            modules = (sign("s", (2, 9), dtype=dtype, base_dtype=base), same("t", (3,), dtype=dtype, base_dtype=base))
            yield f"{dtype.lower()}-on-{base.lower()}", "3.9", Content(modules=modules)
    yield "sign-tail", "3.10", Content(modules=(sign("w", (5, 9), ("row", "col"), base_rows=3),))
    yield "sign-tail-batch", "3.10", Content(modules=(sign("w", (3, 2, 9), ("col",), base_rows=2),))
    yield "sign-fewer-rows", "3.10", Content(modules=(sign("w", (2, 9), ("row+col",), base_rows=5),))
    yield "same-tail", "3.10", Content(modules=(same("w", (5, 3), base_rows=4), same("v", (4,), base_rows=1)))
    yield "same-tail-integers", "3.10", Content(modules=(same("w", (5, 3), dtype="I32", base_rows=4),))
    yield "same-fewer-rows", "3.10", Content(modules=(same("w", (2, 3), base_rows=4),))
    yield (
        "same-tail-other-dtype",
        "3.10",
        Content(modules=(same("w", (3, 3), dtype="F32", base_dtype="BF16", base_rows=2),)),
    )


def texts() -> Iterator[Case]:
    one = (full("w", (1,), dtype="U8"),)
    yield (
        "metadata-escapes",
        "3.2",
        Content(
            modules=one,
            metadata={"controls": "".join(map(chr, range(0x20))), "quotes": "\"\\/'", "delete": "\x7f\x80\u2028"},
        ),
    )
    yield (
        "metadata-utf16-order",
        "3.2",
        Content(modules=one, metadata={"\ufb33": "1", "\U0001f600": "2", "\u20ac": "3", "": "", "a": "4", "A": "5"}),
    )
    yield (
        "metadata-text",
        "3.4",
        Content(
            modules=one,
            metadata={
                "emoji": "\U0001f9ea\u200d\u00e9",
                "noncharacter": "\uffff\U0010ffff",
                "rtl": "\u202etxt.exe",
                "ansi": "\x1b[2J",
            },
        ),
    )
    yield (
        "metadata-key-like-manifest",
        "2.9",
        Content(modules=one, metadata={"modules": "[]", "base": "x", "__metadata__": "{}"}),
    )
    yield "revisions", "3.4", Content(modules=one, base=("b", None), fine_tuned=("f", "main"))
    yield "empty-texts", "3.4", Content(modules=one, base=("", ""), fine_tuned=("", ""), producer=("", ""))
    yield (
        "largest-integer",
        "2.10",
        Content(
            modules=one,
            calibration={
                "digest": "sha256:" + "0" * 64,
                "samples": 2**53 - 1,
                "seed": 2**53 - 1,
                "sequence_length": 0,
                "source": "",
            },
        ),
    )
    yield "name-512", "3.5", Content(modules=(full("n" * 512, (1,), dtype="U8"),))
    printable = "".join(chr(c) for c in range(0x21, 0x7F) if chr(c) not in "/\\")
    yield "name-every-character", "3.5", Content(modules=(full(printable, (1,), dtype="U8"), sign("!", (1, 1))))
    yield (
        "names-like-tensors",
        "4.1",
        Content(
            modules=(
                sign("a", (2, 9)),
                full("a.0", (2,)),
                full("a.0.mask", (1,)),
                full("a.full", (2,)),
                full("a.0.row", (2,)),
                same("a.tail", (2,)),
            )
        ),
    )
    yield (
        "tied",
        "3.6",
        simple(tied=(("model.norm.weight", "A"), ("model.q_proj.weight", "a"), ("model.norm.weight", "z"))),
    )
    yield "dropped", "3.7", simple(dropped=("A", "Z", "a", "model.q_proj", "~"))
    yield (
        "asset-names",
        "3.12",
        simple(
            assets=tuple(
                Asset(path=path, data=path.encode())
                for path in (
                    "config.json",
                    "index.json",
                    "tokenizer.model",
                    "vocab.txt",
                    "chat.jinja",
                    "o200k.tiktoken",
                    "README.md",
                    "_.json",
                    "0.txt",
                    "a..b.json",
                    "x" * 119 + ".json",
                    "special_tokens-map.v2.json",
                    "a.index.txt",
                    "Xindex.json",
                    "1_Pooling/config.json",
                    "additional_chat_templates/tool_use.jinja",
                    "a" * 63 + "/" + "x" * 119 + ".json",
                    "_/_.json",
                )
            )
        ),
    )
    yield "asset-binary", "4.4", simple(assets=(Asset(path="tokenizer.model", data=noise("asset", 300)),))
    yield "asset-order", "4.1", simple(assets=(Asset(path="z.json", data=b"1"), Asset(path="a.json", data=b"22")))


def padded_to(length: int) -> Content:
    """A file whose JSON has exactly `length` bytes."""
    content = Content(modules=(full("w", (1,), dtype="U8"),), metadata={"fill": ""})
    data = build(content)
    missing = length - len(data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip(b" "))
    return Content(modules=content.modules, metadata={"fill": "x" * missing})


def sizes() -> Iterator[Case]:
    yield "header-no-spaces", "2.16", padded_to(4088)
    yield "header-one-space", "2.16", padded_to(4087)
    yield "header-4095-spaces", "2.16", padded_to(4089)
    yield "header-three-pages", "2.3", Content(modules=tuple(sign(f"layer.{i}", (2, 9)) for i in range(12)))


def contents() -> Iterator[Case]:
    """(slug, clause, content) of every golden file."""
    for group in (layout, numbers, encodings, texts, sizes):
        yield from group()
