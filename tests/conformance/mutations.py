"""Structure-aware mutations of PXD files for a random fuzzer and for a coverage-guided one.

A mutation takes its decisions from `pick(n)`, an integer in [0, n). They come from a random generator or from the bytes
that atheris evolves. It works at one of four depths and repairs the layers above it, so that it reaches the later steps
of the reader: raw bytes; the header (N and spaces repaired); the manifest (canonical text and base digest repaired);
the payload (digests repaired).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from peraxis_conformance.generator.build import MAGIC, base_digest, bases, canonical, frame, quoted, table, untabled

__all__ = ["Pick", "mutate", "mutate_text"]

Pick = Callable[[int], int]

NUMBERS = (
    0,
    1,
    -1,
    7,
    8,
    9,
    63,
    64,
    65,
    255,
    4096,
    2**24,
    2**31,
    2**32,
    2**52,
    2**53 - 1,
    2**53,
    2**63,
    2**64,
    10**400,
    -(2**53),
)
TEXTS = (
    "",
    "a",
    "sign",
    "full",
    "same",
    "row",
    "col",
    "row+col",
    "tensor",
    "F16",
    "BF16",
    "F32",
    "U8",
    "F64",
    "BOOL",
    "sha256:",
    "__pad__.0",
    "\x00",
    "\u202e",
    "\ud800",
    "../x",
    "config.json",
    "a" * 513,
    "0" * 64,
    "__metadata__",
    "model.norm.weight",
)
TOKENS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"\\",
    b"\\u0000",
    b"\\ud800",
    b"null",
    b"true",
    b"1e5",
    b"1.0",
    b"-0",
    b"01",
    b"NaN",
    b" ",
    b"\n",
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b'"dtype":"U8",',
    b"9" * 30,
    b"[" * 30,
    b'{"a":' * 12,
)
BROKEN = (TypeError, KeyError, ValueError, AttributeError, IndexError, StopIteration)  # raised for a changed tree


def some(pick: Pick, items: Sequence[Any]) -> Any:
    return items[pick(len(items))]


def raw(pick: Pick, data: bytes) -> bytes:
    """Change a few bytes, or cut, repeat or insert some."""
    at = pick(len(data) + 1)
    size = 1 + pick(16)
    kind = pick(8)
    if kind == 0:
        return data[:at]
    if kind == 6:
        return data[: -1 - pick(3)]
    if kind == 7:
        return data + bytes(1 + pick(64))
    if kind == 1:
        return data[:at] + data[at + size :]
    if kind == 2:
        return data[:at] + data[at : at + size] + data[at:]
    if kind == 3:
        return data[:at] + some(pick, TOKENS) + data[at:]
    if kind == 4:
        return data[:at] + some(pick, TOKENS) + data[at + size :]
    return data[:at] + bytes([pick(256)]) + data[at + 1 :]


def split(data: bytes) -> tuple[bytes, bytes] | None:
    """Return the header without its spaces, and the data."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 4096 or length > len(data) - 8:
        return None
    return data[8 : 8 + length].rstrip(b" "), data[8 + length :]


def parsed(data: bytes) -> tuple[dict[str, Any], list[dict[str, Any]], bytes] | None:
    """Return manifest, records and payload, or None if the file is not parsed as JSON."""
    parts = split(data)
    try:
        header = json.loads(parts[0]) if parts else None
        manifest = json.loads(header["__metadata__"]["manifest"])
        records = [{"name": name, **record} for name, record in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return (manifest, records, parts[1]) if parts and isinstance(manifest, dict) else None


FIELDS = json.JSONEncoder(separators=(",", ":"))
ENCODER = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def joined(manifest: Any, records: Any, payload: bytes) -> bytes:
    """Return the file of these parts. Text that cannot be encoded is replaced."""
    text = ENCODER.encode(manifest)
    if not text.isascii():
        text = canonical(manifest)  # its order of keys differs beyond ASCII
    entries = [MAGIC + '1.0","manifest":' + quoted(text) + "}"]
    for record in records:
        fields = {key: value for key, value in record.items() if key != "name"}
        entries.append(f"{quoted(record['name'])}:{FIELDS.encode(fields)}")
    return frame((",".join(entries) + "}").encode("utf-8", "replace"), payload)


def header(pick: Pick, data: bytes) -> bytes:
    """Change the text of the header, and repair N and the spaces."""
    parts = split(data)
    if parts is None:
        return raw(pick, data)
    return frame(raw(pick, parts[0]), parts[1])


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value under `value`."""
    found = [path] if path else []
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        found += paths(child, (*path, key))
    return found


def changed(pick: Pick, tree: Any) -> Any:
    """Replace, remove, repeat or move one value of a JSON tree, in place."""
    found = paths(tree)
    if not found:
        return tree
    path = some(pick, found)
    holder = tree
    for step in path[:-1]:
        holder = holder[step]
    kind = pick(7)
    if kind == 0:
        del holder[path[-1]]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(path[-1], holder[path[-1]])
    elif kind == 2 and isinstance(holder, list):
        other = pick(len(holder))
        holder[path[-1]], holder[other] = holder[other], holder[path[-1]]
    elif kind == 3 and isinstance(holder, dict):
        holder[some(pick, TEXTS)] = holder[path[-1]]
    elif kind == 4:
        holder[path[-1]] = some(pick, NUMBERS)
    elif kind == 5:
        holder[path[-1]] = some(pick, (None, True, [], {}, [[]], "x", holder[path[-1]]))
    else:
        holder[path[-1]] = some(pick, TEXTS)
    return tree


def manifest(pick: Pick, data: bytes) -> bytes:
    """Change the manifest, and repair its text, its base digest and the header."""
    parts = parsed(data)
    if parts is None:
        return raw(pick, data)
    held, records, payload = parts
    held = changed(pick, held)
    with contextlib.suppress(*BROKEN):  # the change may have broken what the digest covers
        held["base"]["digest"] = base_digest(bases(held)) if pick(4) else held["base"]["digest"]
    return joined(held, records, payload)


def records(pick: Pick, data: bytes) -> bytes:
    """Change a record of the header."""
    parts = parsed(data)
    if parts is None:
        return raw(pick, data)
    held, listed, payload = parts
    listed = [
        record for record in changed(pick, listed) if isinstance(record, dict) and isinstance(record.get("name"), str)
    ]
    return joined(held, listed, payload)


def payload(pick: Pick, data: bytes) -> bytes:
    """Change the data in place, and repair the digests that cover it."""
    parts = parsed(data)
    if parts is None or not parts[2]:
        return raw(pick, data)
    held, listed, body = parts
    at = pick(len(body))
    body = body[:at] + some(pick, (b"\x00", b"\xff", b"\x7c", b"\x80", b"\x01", b"\xfe\xff")) + body[at + 1 :]
    body = body[: len(parts[2])]
    with contextlib.suppress(*BROKEN):  # the header may not say what the digests cover
        repair(held, listed, body)
    return joined(held, listed, body)


def repair(held: dict[str, Any], listed: list[dict[str, Any]], body: bytes) -> None:
    """The digests of modules and assets after a change of the data."""
    spans = {r["name"]: r["data_offsets"] for r in listed}
    digests, at = untabled(held["digests"]), 0
    for module in held["modules"]:
        at += module.get("base", "like it") is not None
        own = spans.get(f"{module['name']}.full") or spans.get(f"{module['name']}.delta")
        if own:
            digests[at] = hashlib.sha256(body[own[0] : own[1]]).hexdigest()
            at += 1
    held["digests"] = table(digests)
    for i, asset in enumerate(held["assets"]):
        begin, end = next(r["data_offsets"] for r in listed if r["name"] == f"__asset__.{i}")
        asset["sha256"] = hashlib.sha256(body[begin:end]).hexdigest()


def crossed(pick: Pick, data: bytes, other: bytes) -> bytes:
    """Return the header of one file followed by the data of another."""
    a, b = split(data), split(other)
    return raw(pick, data) if a is None or b is None else frame(a[0], b[1])


LEVELS = (raw, header, header, manifest, manifest, manifest, records, records, payload)


def mutate(pick: Pick, seeds: Sequence[bytes]) -> bytes:
    """Apply one to three mutations to one seed."""
    data: bytes = some(pick, seeds)
    for _ in range(1 + pick(3)):
        data = crossed(pick, data, some(pick, seeds)) if pick(24) == 0 else some(pick, LEVELS)(pick, data)
    return data


def mutate_text(pick: Pick, seeds: Sequence[bytes]) -> bytes:
    """Apply one to three mutations to bytes or to the header's text, for files that are too large for a JSON tree."""
    data: bytes = some(pick, seeds)
    for _ in range(1 + pick(3)):
        data = (raw, header)[pick(2)](pick, data)
    return data
