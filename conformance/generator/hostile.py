"""Files made to exhaust, overflow or mislead a reader; the large ones are made when the kit runs."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from .build import MAGIC, base_digest, build, canonical, frame, header_json
from .content import Asset, Base, Content, Module, full
from .entry import Entry, Made, Special, refused
from .faults import put, record, replaced
from .valid import simple

__all__ = ["hostile", "large"]

LIMIT = 2**24 - 8
TEXT = "one line of text in the middle"
SIMPLE = simple(metadata={"text": TEXT})
ROOM: dict[str, Any] = {"seconds": 60, "mib": 1024}


def many(count: int) -> tuple[Module, ...]:
    """Modules that need no tensors, so that as many as possible fit into a header."""
    base = Base(dtype="U8", shape=(1,), data=b"\x00")
    return tuple(Module(name=f"{i:x}", dtype="U8", shape=(1,), encoding="same", base=base) for i in range(count))


def modules_file(count: int) -> bytes:
    return build(Content(modules=many(count)))


def bomb(unit: str) -> bytes:
    """A header of the largest size whose one record is `unit` again and again."""
    start = MAGIC + '1.0","manifest":"{}"},"a":['
    times = (LIMIT - len(start) - 8) // (len(unit) + 1)
    return frame((start + ",".join([unit] * times) + "]}").encode(), b"")


def deep(opening: str) -> bytes:
    start = MAGIC + '1.0","manifest":"{}"},"a":'
    return frame((start + opening * ((LIMIT - len(start)) // len(opening))).encode(), b"")


def digits() -> bytes:
    start = MAGIC + '1.0","manifest":"{}"},"a":{"dtype":"U8","shape":['
    return frame((start + "9" * (LIMIT - len(start) - 40) + '],"data_offsets":[0,1]}}').encode(), b"\0")


def long_keys() -> bytes:
    start = MAGIC + '1.0","manifest":"{}"}'
    keys = "".join(f',"{i:07x}":0' for i in range((LIMIT - len(start) - 1) // 12))
    return frame((start + keys + "}").encode(), b"")


def filled(length: int) -> bytes:
    """A file whose JSON has this many bytes: modules, and what is missing as metadata."""
    plain = build(Content(modules=many(60_000), metadata={"fill": ""}))
    missing = length - len(plain[8 : 8 + int.from_bytes(plain[:8], "little")].rstrip(b" "))
    return build(Content(modules=many(60_000), metadata={"fill": "x" * missing}))


def metadata_of(size: int) -> bytes:
    """A file whose metadata has this many bytes of canonical JSON, most of them three a character."""
    characters, rest = divmod(size - len('{"":""}'), 3)
    return build(simple(metadata={"": "\u7de9" * characters + "x" * rest}))


def values_of(text: str) -> int:
    """SPEC 2.11: the elements and members of all arrays and objects of a canonical text."""
    return sum(bool(mark) for mark in re.findall(r'"(?:[^"\\]|\\.)*"|(,|[\[{](?![\]}]))', text))


def manifest_values(count: int) -> bytes:
    """A file whose manifest has this many values: modules of eight dimensions, the rest as members of metadata."""
    base = Base(dtype="U8", shape=(1,) * 8, data=b"\x00")
    modules = tuple(
        Module(name=f"{i:x}", dtype="U8", shape=(1,) * 8, encoding="same", base=base) for i in range(count // 28)
    )
    missing = count - values_of(manifest_text(build(Content(modules=modules))))
    return build(Content(modules=modules, metadata={f"{i:x}": "" for i in range(missing)}))


def header_values(count: int) -> bytes:
    """A header of this many values, all of them in order: four, and fourteen a record of eight dimensions."""
    records = [
        {"name": f"{i:x}", "dtype": "U8", "shape": [1] * 8, "data_offsets": [i, i + 1]}
        for i in range((count - 4) // 14)
    ]
    return frame(header_json("1.0", "{}", records).encode(), bytes(len(records)))


def entries(count: int) -> dict[str, Any]:
    """As many entries of each list of the manifest."""
    names = tuple(f"{i:05x}" for i in range(count))
    return {
        "dropped": names,
        "tied": tuple(("model.norm.weight", name) for name in names),
        "metadata": dict.fromkeys(names, ""),
        "assets": [{"path": f"{name}.md", "sha256": "0" * 64} for name in names],
    }


def listed(key: str, count: int) -> bytes:
    """A file with as many entries in one list; assets are in the manifest alone."""
    held = entries(count)[key]
    return build(SIMPLE, manifest=put("assets", to=held)) if key == "assets" else build(simple(**{key: held}))


LARGE = {
    "modules-65536": lambda: modules_file(65536),
    "modules-65537": lambda: modules_file(65537),
    "header-largest": lambda: filled(LIMIT),
    "header-over-limit": lambda: filled(LIMIT + 1),
    "metadata-largest": lambda: metadata_of(2**22),
    "metadata-over-limit": lambda: metadata_of(2**22 + 1),
    "manifest-values-2-20": lambda: manifest_values(2**20),
    "manifest-values-over-limit": lambda: manifest_values(2**20 + 1),
    "header-values-2-20": lambda: header_values(2**20),
    "header-values-over-limit": lambda: header_values(2**20 + 14),
    **{f"{key}-65536": functools.partial(listed, key, 65536) for key in ("dropped", "tied", "metadata")},
    **{f"{key}-65537": functools.partial(listed, key, 65537) for key in ("dropped", "tied", "metadata", "assets")},
    "many-arrays": lambda: bomb("[]"),
    "many-objects": lambda: bomb("{}"),
    "many-numbers": lambda: bomb("1"),
    "deep-arrays": lambda: deep("["),
    "deep-objects": lambda: deep('{"a":'),
    "digits": digits,
    "many-keys": long_keys,
}


@functools.lru_cache(maxsize=1)
def large(name: str) -> bytes:
    """The file of this name; 16 MiB, so made when needed."""
    return LARGE[name]()


def large_entries() -> Iterator[Entry]:
    """The limits of SPEC 9 that take a large file to reach: the last one within, the first one beyond."""
    for name, clause in (
        ("modules-65536", "3.8"),
        ("header-largest", "2.3"),
        ("manifest-values-2-20", "2.11"),
        ("metadata-largest", "3.8"),
        ("dropped-65536", "3.8"),
        ("tied-65536", "3.8"),
        ("metadata-65536", "3.8"),
    ):
        kept = {"content_id": "sha256:" + hashlib.sha256(manifest_text(large(name)).encode()).hexdigest()}
        yield Entry(id=f"limit-{name}", clause=clause, files={"file": Made(name=name)}, expect=kept, **ROOM)
    for name in ("modules", "dropped", "tied", "metadata", "assets"):
        yield refused(f"limit-{name}-65537", "E208", "3.8", Made(name=f"{name}-65537"), **ROOM)
    yield refused("limit-metadata", "E208", "3.8", Made(name="metadata-over-limit"), **ROOM)
    yield refused("limit-header", "E110", "2.3", Made(name="header-over-limit"), **ROOM)
    yield refused("limit-manifest-values", "E202", "3.1", Made(name="manifest-values-over-limit"), **ROOM)
    yield refused("limit-header-values", "E117", "2.11", Made(name="header-values-over-limit"), **ROOM)
    within = Made(name="header-values-2-20")
    yield refused("limit-header-values-within", "E205", "3.4", within, "the container is sound", **ROOM)
    for name in ("many-arrays", "many-objects", "many-numbers", "many-keys"):
        yield refused(
            f"bomb-{name}", "E117 E118", "2.11", Made(name=name), "16 MiB of header that says nothing", **ROOM
        )
    yield refused("bomb-deep-arrays", "E117 E114", "2.11", Made(name="deep-arrays"), **ROOM)
    yield refused("bomb-deep-objects", "E117 E114", "2.11", Made(name="deep-objects"), **ROOM)
    yield refused(
        "bomb-digits",
        "E116 E118",
        "2.10",
        Made(name="digits"),
        "a parser of quadratic time does not end in time",
        **ROOM,
    )


def small() -> Iterator[Entry]:
    nested = "[" * 1500 + "]" * 1500
    yield refused("nested-1500", "E117", "2.11", build(SIMPLE, header=replaced('"shape":[5]', f'"shape":{nested}')))
    yield refused(
        "nested-unclosed", "E117 E114", "2.11", frame((MAGIC + '1.0","manifest":"{}"},"a":' + "[" * 3900).encode(), b"")
    )
    yield refused("manifest-nested-1500", "E202", "3.1", build(SIMPLE, text=replaced(f'"{TEXT}"', nested)))
    yield refused("manifest-is-nested-unclosed", "E202", "3.1", build(SIMPLE, text=lambda t: '{"a":' * 500))
    for slug, prefix in (
        ("ansi", "\x1b]0;owned\x07\x1b[2J"),
        ("bidi", "\u202e\u2066"),
        ("line", "ok\r\nE000"),
        ("zero-width", "\u200b"),
    ):
        yield refused(f"name-{slug}", "E206", "3.5", build(Content(modules=(full(prefix + "w", (1,), dtype="U8"),))))
        yield refused(
            f"asset-{slug}", "E211", "3.12", build(simple(assets=(Asset(path=prefix + ".json", data=b"{}"),)))
        )
        yield refused(f"feature-{slug}", "E204", "3.3", build(SIMPLE, manifest=put("features", to=[prefix])))
        yield refused(
            f"version-{slug}",
            "E201",
            "2.6",
            build(
                SIMPLE,
                header=replaced(
                    '"1.0"', f'"1.0{prefix}"'.replace("\x1b", "^").replace("\x07", "").replace("\r\n", " ")
                ),
            ),
        )
    for slug, path in (
        ("traversal", "../../etc/cron.d/job.json"),
        ("device", "/dev/null.json"),
        ("home", "~/.bashrc.txt"),
        ("drive", "C:\\boot.txt"),
        ("stream", "a.json:b.json"),
    ):
        yield refused(f"asset-{slug}", "E211", "3.12", build(simple(assets=(Asset(path=path, data=b"{}"),))))
    spans = {
        "end-2-53": [128, 2**53 - 1],
        "begin-2-53": [2**53 - 11, 2**53 - 1],
        "end-2-63": [128, 2**63 - 1],
        "end-2-64": [128, 2**64 + 138],
        "wrap-2-32": [128, 2**32 + 138],
    }
    for slug, held in spans.items():
        yield refused(f"offsets-{slug}", "E121 E116 E123", "2.15", build(SIMPLE, records=record(-1, data_offsets=held)))
    for slug, shape in (
        ("2-32", [2**32, 5]),
        ("2-31", [2**31, 2**21]),
        ("eight-large", [2**52] * 8),
        ("2-62", [2**31, 2**31, 5]),
    ):
        yield refused(f"shape-{slug}", "E120 E121", "2.14", build(SIMPLE, records=record(-1, shape=shape)))
    for length in (2**63, 2**64 - 1, 2**62, 0x7FFFFFFFFFFFF0F8, 2**31 + 4088, 2**53 + 4088):
        # The low byte 0xF8 is what the first byte of the file must be (2.2); other lengths are told apart there.
        code = "E110" if length & 0xFF == 0xF8 else "E112"
        yield refused(
            f"length-{length:x}",
            code,
            "2.3" if code == "E110" else "2.5",
            length.to_bytes(8, "little") + build(SIMPLE)[8:],
        )
    huge = {"modules": [["w", "U8", [2**53 - 1], "0" * 64]]}
    row = huge["modules"][0]
    giant = {
        "name": row[0],
        "dtype": row[1],
        "shape": row[2],
        "encoding": "same",
        "components": [],
        "sha256": None,
        "base": {"dtype": "U8", "shape": row[2], "sha256": row[3]},
    }
    claims = build(
        Content(modules=(full("v", (1,), dtype="U8"),)),
        manifest=lambda m: {
            **m,
            "modules": [*m["modules"], giant],
            "base": {**m["base"], "digest": base_digest([giant])},
        },
    )
    text_id = "sha256:" + hashlib.sha256(manifest_text(claims).encode()).hexdigest()
    yield Entry(
        id="claims-2-53-without-data",
        clause="3.9",
        files={"file": claims},
        expect={"content_id": text_id},
        note="a module that is the base's needs no bytes, however large",
        mib=128,
    )
    wide = {**giant, "shape": [2**53 - 1] * 8, "base": {**giant["base"], "shape": [2**53 - 1] * 8}}
    overflow = build(
        Content(modules=(full("v", (1,), dtype="U8"),)),
        manifest=lambda m: {
            **m,
            "modules": [*m["modules"], {**wide, "shape": [2**53 - 1] * 7}],
            "base": {**m["base"], "digest": base_digest([wide])},
        },
    )
    yield refused("shapes-differ-2-53", "E208 E209", "3.8", overflow)
    text = canonical({"a": "b"})
    yield refused("manifest-of-one-key", "E205", "3.4", frame(header_json("1.0", text, []).encode(), b""))
    yield refused("only-magic", "E112", "2.5", frame(MAGIC.encode()[:-1], b""))
    yield Entry(
        id="symbolic-link",
        clause="2.1",
        files={"file": Special(kind="symlink", source="valid/simple")},
        expect={},
        note="hub caches hold links to regular files",
    )


def manifest_text(file: bytes) -> str:
    return str(json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])["__metadata__"]["manifest"])


def hostile() -> Iterator[Entry]:
    """Every case of this module."""
    yield from small()
    yield from large_entries()
