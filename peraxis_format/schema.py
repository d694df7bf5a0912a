"""Bytes -> a typed manifest (SPEC 3.1 to 3.4), entry by entry, so that it is never in memory as a tree of JSON.

Each function of a type takes (value, path) and fails with E205 at the path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from json.encoder import encode_basestring
from typing import Final, TypeVar

from peraxis_format.delta import Axis, BaseRef, Encoding
from peraxis_format.dtypes import DType
from peraxis_format.errors import fail
from peraxis_format.manifest import (
    ENTRIES_MAX,
    EXACT_FEATURE,
    FEATURES,
    METADATA_MAX,
    Asset,
    BaseIdentity,
    Calibration,
    ComponentEntry,
    Identity,
    Manifest,
    ModuleEntry,
    Producer,
)
from peraxis_format.strict_json import PIECE_MAX, Json, StrictJsonError, check_text, parse_piece, pieces

__all__ = ["parse_manifest"]

_HEX: Final = re.compile(r"[0-9a-f]{64}")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_KEY: Final = re.compile(rb'("(?:[^"\\]++|\\.)*+"):', re.DOTALL)
# What a piece must be byte for byte. Keys beyond ASCII, whose order differs from that of UTF-16, have no place in one.
_CANONICAL: Final = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))

T = TypeVar("T")
E = TypeVar("E", Axis, DType, Encoding)


def _object(value: Json, path: str, keys: str) -> dict[str, Json]:
    if not isinstance(value, dict):
        fail("E205", "not an object", field=path)
    wanted = set(keys.split())
    for key in sorted(value.keys() - wanted):
        fail("E205", f"unknown key {key!r}", field=path)
    for key in sorted(wanted - value.keys()):
        fail("E205", f"missing key {key!r}", field=path)
    return value


def _array(value: Json, path: str, item: Callable[[Json, str], T]) -> tuple[T, ...]:
    if not isinstance(value, list):
        fail("E205", "not an array", field=path)
    return tuple(item(element, f"{path}[{i}]") for i, element in enumerate(value))


def _text(value: Json, path: str) -> str:
    if not isinstance(value, str):
        fail("E205", "not a string", field=path)
    return value


def _optional(value: Json, path: str, item: Callable[[Json, str], T]) -> T | None:
    return None if value is None else item(value, path)


def _integer(value: Json, path: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        fail("E205", "not an integer", field=path)
    return value


def _natural(value: Json, path: str) -> int:
    number = _integer(value, path)
    if number < 0:
        fail("E205", f"{number} is negative", field=path)
    return number


def _matching(pattern: re.Pattern[str], what: str) -> Callable[[Json, str], str]:
    def item(value: Json, path: str) -> str:
        text = _text(value, path)
        if not pattern.fullmatch(text):
            fail("E205", f"not {what}", field=path)
        return text

    return item


_hex = _matching(_HEX, "64 lower-case hex digits")
_digest = _matching(_DIGEST, "sha256: and 64 lower-case hex digits")


def _one_of(kind: type[E], value: Json, path: str) -> E:
    text = _text(value, path)
    try:
        return kind(text)
    except ValueError:
        fail("E205", f"unknown {kind.__name__.lower()} {text!r}", field=path)


def _dtype(value: Json, path: str) -> DType:
    return _one_of(DType, value, path)


def _base_ref(value: Json, path: str) -> BaseRef:
    fields = _object(value, path, "dtype sha256 shape")
    return BaseRef(
        dtype=_dtype(fields["dtype"], f"{path}.dtype"),
        shape=_array(fields["shape"], f"{path}.shape", _natural),
        sha256=_hex(fields["sha256"], f"{path}.sha256"),
    )


def _component(value: Json, path: str) -> ComponentEntry:
    fields = _object(value, path, "axis exponent")
    return ComponentEntry(
        axis=_one_of(Axis, fields["axis"], f"{path}.axis"),
        exponent=_integer(fields["exponent"], f"{path}.exponent"),
    )


def _module(value: Json, path: str) -> ModuleEntry:
    exact = isinstance(value, dict) and value.get("encoding") == Encoding.EXACT.value
    fields = _object(value, path, "base components dtype encoding name sha256 shape" + " result size" * exact)
    return ModuleEntry(
        name=_text(fields["name"], f"{path}.name"),
        shape=_array(fields["shape"], f"{path}.shape", _natural),
        dtype=_dtype(fields["dtype"], f"{path}.dtype"),
        encoding=_one_of(Encoding, fields["encoding"], f"{path}.encoding"),
        components=_array(fields["components"], f"{path}.components", _component),
        sha256=_optional(fields["sha256"], f"{path}.sha256", _hex),
        base=_optional(fields["base"], f"{path}.base", _base_ref),
        size=_natural(fields["size"], f"{path}.size") if exact else None,
        result=_hex(fields["result"], f"{path}.result") if exact else None,
    )


def _asset(value: Json, path: str) -> Asset:
    fields = _object(value, path, "path sha256")
    return Asset(path=_text(fields["path"], f"{path}.path"), sha256=_hex(fields["sha256"], f"{path}.sha256"))


def _pair(value: Json, path: str) -> tuple[str, str]:
    names = _array(value, path, _text)
    if len(names) != 2:
        fail("E205", "not a pair of names", field=path)
    return names[0], names[1]


def _calibration(value: Json, path: str) -> Calibration:
    fields = _object(value, path, "digest samples seed sequence_length source")
    return Calibration(
        digest=_digest(fields["digest"], f"{path}.digest"),
        samples=_natural(fields["samples"], f"{path}.samples"),
        seed=_natural(fields["seed"], f"{path}.seed"),
        sequence_length=_natural(fields["sequence_length"], f"{path}.sequence_length"),
        source=_text(fields["source"], f"{path}.source"),
    )


def _identity(value: Json, path: str) -> Identity:
    fields = _object(value, path, "id revision")
    return Identity(
        id=_text(fields["id"], f"{path}.id"), revision=_optional(fields["revision"], f"{path}.revision", _text)
    )


def _base_identity(value: Json, path: str) -> BaseIdentity:
    fields = _object(value, path, "digest id revision")
    return BaseIdentity(
        digest=_digest(fields["digest"], f"{path}.digest"),
        id=_text(fields["id"], f"{path}.id"),
        revision=_optional(fields["revision"], f"{path}.revision", _text),
    )


def _producer(value: Json, path: str) -> Producer:
    fields = _object(value, path, "name version")
    return Producer(name=_text(fields["name"], f"{path}.name"), version=_text(fields["version"], f"{path}.version"))


# --- the manifest's text, piece by piece --------------------------------------------------------------

Span = tuple[int, int]


def _value(data: bytes, span: Span, path: str, most: int = PIECE_MAX) -> Json:
    """The value of one piece, held to SPEC 3.1 and 3.2."""
    begin, end = span
    if end - begin > most:
        fail("E208", f"{end - begin} bytes", field=path)  # SPEC 3.8
    piece = data[begin:end]
    value = parse_piece(piece, begin)
    try:
        canonical = _CANONICAL.encode(value).encode("utf-8")
    except UnicodeEncodeError:
        canonical = b""  # an unpaired surrogate has no canonical form
    if canonical != piece:
        fail("E203", field=path)  # SPEC 3.2
    return value


def _members(data: bytes, span: Span, path: str, depth: int) -> Iterator[tuple[str, Span]]:
    """Key and span of the value of each member of an object, held to SPEC 2.9 and 3.2."""
    before, canonical = b"", True
    for i, (begin, end) in enumerate(pieces(data, *span, depth=depth)):
        if i >= ENTRIES_MAX:
            fail("E208", f"more than {ENTRIES_MAX} members", field=path)  # SPEC 3.8
        match = _KEY.match(data, begin, min(end, begin + PIECE_MAX))
        if match is None:
            if end - begin <= PIECE_MAX and not parse_piece(b"{" + data[begin:end] + b"}", begin):
                raise StrictJsonError("E114", "nothing beside a comma", begin)
            fail("E203", field=path)  # SPEC 3.2
        key = str(parse_piece(match[1], begin))
        order = key.encode("utf-16-be", "surrogatepass")
        if i and order == before:
            raise StrictJsonError("E115", repr(key[:64]), begin)  # SPEC 2.9
        canonical = canonical and order >= before and encode_basestring(key).encode("utf-8", "replace") == match[1]
        before = order
        yield key, (match.end(), end)
    if not canonical:
        fail("E203", "keys", field=path)  # SPEC 3.2


def _entries(data: bytes, span: Span, path: str, item: Callable[[Json, str], T]) -> tuple[T, ...]:
    """A list of the manifest, each entry typed before the next one is parsed."""
    if data[span[0]] != 0x5B:  # not an array
        return _array(_value(data, span, path), path, item)

    def typed() -> Iterator[T]:
        for i, entry in enumerate(pieces(data, *span, depth=2)):
            if i >= ENTRIES_MAX:
                fail("E208", f"more than {ENTRIES_MAX} entries", field=path)  # SPEC 3.8
            yield item(_value(data, entry, f"{path}[{i}]"), f"{path}[{i}]")

    return tuple(typed())


def _metadata(data: bytes, span: Span) -> dict[str, str]:
    begin, end = span
    if end - begin > METADATA_MAX:
        fail("E208", f"{end - begin} bytes", field="metadata")  # SPEC 3.8
    if data[begin] != 0x7B:
        _value(data, span, "metadata")
        fail("E205", "not an object", field="metadata")
    texts: dict[str, str] = {}
    for key, value in _members(data, span, "metadata", depth=2):
        path = f"metadata[{key[:64]!r}]"
        texts[key] = _text(_value(data, value, path, METADATA_MAX if data[value[0]] == 0x22 else PIECE_MAX), path)
    return texts


_KEYS: Final = "assets base calibration dropped features fine_tuned metadata modules producer tied"
_CHAIN_KEYS: Final = " previous result"


def parse_manifest(data: bytes) -> Manifest:
    """Parse the manifest's bytes into typed values (SPEC 3.1 to 3.4, 3.7, and the lengths of 3.8).

    Raises ProfileError (E202, E203, E205, E208) or UnsupportedError (E204).
    """
    try:
        check_text(data)
        return _parse(data)
    except StrictJsonError as error:
        fail("E202", error.detail, field="manifest")  # SPEC 3.1


def _parse(data: bytes) -> Manifest:
    bare = data.strip(b" \t\r\n")
    if bare[:1] != b"{" or data.rstrip(b" ") != bare:
        fail("E202", "not an object", field="manifest")  # SPEC 3.1
    if bare != data:
        fail("E203", "white space", field="manifest")  # SPEC 3.2
    spans = dict(_members(data, (0, len(data)), "manifest", depth=1))
    if "features" in spans:
        # SPEC 3.3: before the schema, since a feature may bring keys that this reader does not know.
        _check_features(_value(data, spans["features"], "features"))
    # SPEC 3.14: the fields of a chain stand with the feature, and without it nowhere.
    chained = "features" in spans and _value(data, spans["features"], "features") == [EXACT_FEATURE]
    _object(dict.fromkeys(spans), "manifest", _KEYS + _CHAIN_KEYS * chained)
    manifest = _typed(data, spans, chained)
    for path, names in (("tied", [alias for _, alias in manifest.tied]), ("dropped", list(manifest.dropped))):
        if names != sorted(names):
            fail("E205", "not sorted", field=path)  # SPEC 3.7
    if list(manifest.features) != sorted(set(manifest.features)):
        fail("E205", "not sorted, or one twice", field="features")  # SPEC 3.3
    return manifest


def _typed(data: bytes, spans: dict[str, Span], chained: bool) -> Manifest:
    def value(key: str) -> Json:
        return _value(data, spans[key], key)

    return Manifest(
        assets=_entries(data, spans["assets"], "assets", _asset),
        base=_base_identity(value("base"), "base"),
        calibration=_optional(value("calibration"), "calibration", _calibration),
        dropped=_entries(data, spans["dropped"], "dropped", _text),
        features=_array(value("features"), "features", _text),
        fine_tuned=_identity(value("fine_tuned"), "fine_tuned"),
        metadata=_metadata(data, spans["metadata"]),
        modules=_entries(data, spans["modules"], "modules", _module),
        producer=_producer(value("producer"), "producer"),
        tied=_entries(data, spans["tied"], "tied", _pair),
        previous=_optional(value("previous"), "previous", _digest) if chained else None,
        result=_optional(value("result"), "result", _digest) if chained else None,
    )


def _check_features(value: Json) -> None:
    if not isinstance(value, list) or not all(isinstance(feature, str) for feature in value):
        return  # the schema refuses it, with its path
    for feature in value:
        if feature not in FEATURES:
            fail("E204", repr(feature), field="features")
