"""Files of up to 16 MiB of header, made when the kit runs: the limits of SPEC 9, and bombs."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from .build import MAGIC, build, frame, header_json
from .content import Base, Content, Module
from .entry import Entry, Made, refused
from .faults import put
from .samples import SIMPLE
from .valid import simple

__all__ = ["LARGE", "large", "large_entries", "manifest_text"]

LIMIT = 2**24 - 8
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


def manifest_text(file: bytes) -> str:
    return str(json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])["__metadata__"]["manifest"])


LARGE: dict[str, Callable[[], bytes]] = {
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
