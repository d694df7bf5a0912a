"""Files of up to 64 MiB of header, made when the kit runs: the limits of SPEC 9, and bombs."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from .build import MAGIC, build, canonical, frame, header_json, manifest_text, table
from .content import Content, full
from .entry import Entry, Made, refused
from .faults import put
from .samples import SIMPLE
from .valid import simple

__all__ = ["LARGE", "large", "large_entries"]

LIMIT = 2**26 - 8
MANY = 2**18  # modules, and entries of each list
VALUES = 2**22
METADATA = 2**24
ROOM: dict[str, Any] = {"seconds": 240, "mib": 2048}


def assembled(count: int, *, dimensions: int = 1, **lists: Any) -> bytes:
    """A file of `count` modules that need no tensors, written as text; `lists` replace those of the manifest."""
    name, shape = "{:05x}".format, "[" + ",".join("1" * dimensions) + "]"
    digest = hashlib.sha256(b"\0").hexdigest()
    rows = ",".join(f'["{name(i)}","U8",{shape},"{digest}"]' for i in range(count))
    modules = (f'{{"dtype":"U8","encoding":"same","name":"{name(i)}","shape":{shape}}}' for i in range(count))
    manifest = json.loads(manifest_text(build(Content(modules=(full("w", (1,)),)))))
    manifest |= {"modules": "MODULES", "digests": table([digest] * count), **lists}
    manifest["base"]["digest"] = "sha256:" + hashlib.sha256(f"[{rows}]".encode()).hexdigest()
    text = canonical(manifest).replace('"MODULES"', f"[{','.join(modules)}]")
    return frame(header_json("1.0", text, []).encode(), b"")


def names_of(count: int, last: str) -> list[str]:
    """Sorted distinct names that are not names of modules."""
    return [f"{i:05x}{last}" for i in range(count)]


def bomb(unit: str) -> bytes:
    """A header of the largest size whose one record repeats `unit`."""
    start = MAGIC + '1.0","manifest":"{}"},"a":['
    times = (LIMIT - len(start) - 8) // (len(unit) + 1)
    return frame((start + (unit + ",") * (times - 1) + unit + "]}").encode(), b"")


def deep(opening: str) -> bytes:
    start = MAGIC + '1.0","manifest":"{}"},"a":'
    return frame((start + opening * ((LIMIT - len(start)) // len(opening))).encode(), b"")


def digits() -> bytes:
    start = MAGIC + '1.0","manifest":"{}"},"a":{"dtype":"U8","shape":['
    return frame((start + "9" * (LIMIT - len(start) - 40) + '],"data_offsets":[0,1]}}').encode(), b"\0")


def long_keys() -> bytes:
    start = MAGIC + '1.0","manifest":"{}"}'
    # The last three digits are formatted once: 5.6 million keys one by one take seconds.
    page = "".join(f',"----{i:03x}":0' for i in range(4096))
    count = (LIMIT - len(start) - 1) // 12
    keys = "".join(page.replace("----", f"{i:04x}") for i in range(count // 4096 + 1))[: 12 * count]
    return frame((start + keys + "}").encode(), b"")


def filled(length: int) -> bytes:
    """A file whose JSON has this many bytes: modules, long names, and the rest as metadata."""
    long = names_of(MANY, "d" * 100)
    missing = length - len(assembled(MANY, dropped=long, metadata={"fill": ""})[8:].rstrip(b" "))
    return assembled(MANY, dropped=long, metadata={"fill": "x" * missing})


def metadata_of(size: int) -> bytes:
    """A file whose metadata has this many bytes of canonical JSON, most of them in characters of three bytes."""
    characters, rest = divmod(size - len('{"":""}'), 3)
    return build(simple(metadata={"": "\u7de9" * characters + "x" * rest}))


def manifest_values(count: int) -> bytes:
    """A file whose manifest has this many values: modules of eight dimensions, aliases, the rest as metadata.

    11 values are those of the manifest itself, 7 those of its objects; a module has 13, an alias 3.
    """
    modules = MANY - 1000
    aliases = [["00000", name] for name in names_of(MANY, "a")]
    missing = count - 18 - 13 * modules - 3 * MANY
    return assembled(modules, dimensions=8, tied=aliases, metadata={f"{i:x}": "" for i in range(missing)})


def header_values(count: int) -> bytes:
    """A valid header of this many values: four, and six for each record besides its dimensions."""
    records, rest = divmod(count - 4, 14)
    shapes = [",".join("1" * dimensions) for dimensions in [8] * records + [rest - 6]]
    made = (f',"{i:x}":{{"dtype":"U8","shape":[{s}],"data_offsets":[{i},{i + 1}]}}' for i, s in enumerate(shapes))
    return frame((header_json("1.0", "{}", [])[:-1] + "".join(made) + "}").encode(), bytes(len(shapes)))


def entries(count: int) -> dict[str, Any]:
    """`count` entries of each list of the manifest."""
    names = tuple(f"{i:05x}" for i in range(count))
    return {
        "dropped": names,
        "tied": tuple(("model.norm.weight", name) for name in names),
        "metadata-entries": dict.fromkeys(names, ""),
        "assets": [{"path": f"{name}.md", "sha256": "0" * 64} for name in names],
    }


def listed(key: str, count: int) -> bytes:
    """A file with `count` entries in one list; assets are in the manifest alone."""
    held = entries(count)[key]
    return (
        build(SIMPLE, manifest=put("assets", to=held))
        if key == "assets"
        else build(simple(**{key.partition("-")[0]: held}))
    )


def limits_met() -> bytes:
    """A file with the largest number of modules and of entries in each other list."""
    return assembled(
        MANY,
        tied=[["00000", name] for name in names_of(MANY, "a")],
        dropped=names_of(MANY, "d"),
        metadata=dict.fromkeys(names_of(MANY, ""), ""),
    )


LARGE: dict[str, Callable[[], bytes]] = {
    "limits-met": limits_met,
    "modules-over-limit": lambda: assembled(MANY + 1),
    "header-largest": lambda: filled(LIMIT),
    "header-over-limit": lambda: build(simple(metadata={"": "x" * LIMIT})),
    "metadata-largest": lambda: metadata_of(METADATA),
    "metadata-over-limit": lambda: metadata_of(METADATA + 1),
    "manifest-values-largest": lambda: manifest_values(VALUES),
    "manifest-values-over-limit": lambda: manifest_values(VALUES + 1),
    "header-values-largest": lambda: header_values(VALUES),
    "header-values-over-limit": lambda: header_values(VALUES + 1),
    **{
        f"{key}-over-limit": functools.partial(listed, key, MANY + 1)
        for key in ("dropped", "tied", "metadata-entries", "assets")
    },
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
    """The file of this name; up to 64 MiB, so made when needed."""
    return LARGE[name]()


def large_entries() -> Iterator[Entry]:
    """The limits of SPEC 9 that need a large file: the last value within and the first beyond."""
    for name, clause in (
        ("limits-met", "3.8"),
        ("header-largest", "2.3"),
        ("manifest-values-largest", "2.11"),
        ("metadata-largest", "3.8"),
    ):
        kept = {"content_id": "sha256:" + hashlib.sha256(manifest_text(large(name)).encode()).hexdigest()}
        yield Entry(id=f"limit-{name}", clause=clause, files={"file": Made(name=name)}, expect=kept, **ROOM)
    for name in ("modules", "dropped", "tied", "metadata", "metadata-entries", "assets"):
        yield refused(f"limit-{name}", "E208", "3.8", Made(name=f"{name}-over-limit"), **ROOM)
    yield refused("limit-header", "E110", "2.3", Made(name="header-over-limit"), **ROOM)
    yield refused("limit-manifest-values", "E202", "3.1", Made(name="manifest-values-over-limit"), **ROOM)
    yield refused("limit-header-values", "E117", "2.11", Made(name="header-values-over-limit"), **ROOM)
    within = Made(name="header-values-largest")
    yield refused("limit-header-values-within", "E205", "3.4", within, "the container is sound", **ROOM)
    for name in ("many-arrays", "many-objects", "many-numbers", "many-keys"):
        yield refused(
            f"bomb-{name}", "E117 E118", "2.11", Made(name=name), "64 MiB of header that says nothing", **ROOM
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
