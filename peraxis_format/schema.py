"""Bytes -> a typed manifest (SPEC 3.1 to 3.4), entry by entry, so that it is never in memory as a tree of JSON.

Each function of a type takes (value, path) and fails with E205 at the path.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from json.encoder import encode_basestring
from typing import Final, TypeVar

from peraxis_format.delta import Axis, BaseRef, Encoding
from peraxis_format.digest_table import DigestReader
from peraxis_format.dtypes import DType
from peraxis_format.errors import fail
from peraxis_format.manifest import (
    ENTRIES_MAX,
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


def _object(value: Json, path: str, keys: str, optional: str = "") -> dict[str, Json]:
    if not isinstance(value, dict):
        fail("E205", "not an object", field=path)
    wanted = set(keys.split())
    for key in sorted(value.keys() - wanted - set(optional.split())):
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


def _component(value: Json, path: str) -> ComponentEntry:
    if not isinstance(value, list) or len(value) != 2:
        fail("E205", "not a pair of axis and exponent", field=path)
    return ComponentEntry(axis=_one_of(Axis, value[0], f"{path}[0]"), exponent=_integer(value[1], f"{path}[1]"))


def _encoding(fields: dict[str, Json], path: str) -> Encoding:
    # SPEC 3.4: `components` say that it is `sign`.
    if ("components" in fields) == ("encoding" in fields):
        fail("E205", "has to have one of components and encoding", field=path)
    if "components" in fields:
        return Encoding.SIGN
    encoding = _one_of(Encoding, fields["encoding"], f"{path}.encoding")
    if encoding is Encoding.SIGN:
        fail("E205", "sign is not written out", field=f"{path}.encoding")
    return encoding


def _module(digests: DigestReader) -> Callable[[Json, str], ModuleEntry]:
    """A module's entry, its digests taken in order."""

    def item(value: Json, path: str) -> ModuleEntry:
        fields = _object(value, path, "name shape", optional="base components dtype encoding")
        shape = _array(fields["shape"], f"{path}.shape", _natural)
        dtype = DType.BF16
        if "dtype" in fields:
            dtype = _dtype(fields["dtype"], f"{path}.dtype")
            if dtype is DType.BF16:
                fail("E205", "BF16 is not written out", field=f"{path}.dtype")  # SPEC 3.4
        encoding = _encoding(fields, path)
        base = _base_ref(fields, path, dtype, shape, digests)
        tail = base is not None and len(shape) > 0 and len(base.shape) > 0 and shape[0] > base.shape[0]
        return ModuleEntry(
            name=_text(fields["name"], f"{path}.name"),
            shape=shape,
            dtype=dtype,
            encoding=encoding,
            components=_array(fields.get("components", []), f"{path}.components", _component),
            sha256=digests.take() if tail or encoding is not Encoding.SAME else None,
            base=base,
        )

    return item


def _base_ref(
    fields: dict[str, Json], path: str, dtype: DType, shape: tuple[int, ...], digests: DigestReader
) -> BaseRef | None:
    if "base" not in fields:
        return BaseRef(dtype=dtype, shape=shape, sha256=digests.take())
    if fields["base"] is None:
        return None
    path = f"{path}.base"
    said = _object(fields["base"], path, "dtype shape")
    base = BaseRef(
        dtype=_dtype(said["dtype"], f"{path}.dtype"),
        shape=_array(said["shape"], f"{path}.shape", _natural),
        sha256=digests.take(),
    )
    if (base.dtype, base.shape) == (dtype, shape):
        fail("E205", "a base like the module is not written out", field=path)  # SPEC 3.4
    return base


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


def _digests(data: bytes, span: Span) -> DigestReader:
    begin, end = span
    if data[begin] != 0x22:
        _text(_value(data, span, "digests"), "digests")
    # Any string that is not canonical is no base64 either.
    return DigestReader(data[begin + 1 : end - 1])


_KEYS: Final = "assets base calibration digests dropped features fine_tuned metadata modules producer tied"


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
    if bare[:1] != b"{" or not data.rstrip(b" ").endswith(bare):
        fail("E202", "not an object", field="manifest")  # SPEC 3.1
    if bare != data:
        fail("E203", "white space", field="manifest")  # SPEC 3.2
    spans = dict(_members(data, (0, len(data)), "manifest", depth=1))
    if "features" in spans:
        # SPEC 3.3: before the schema, since a feature may bring keys that this reader does not know.
        _check_features(_value(data, spans["features"], "features"))
    _object(dict.fromkeys(spans), "manifest", _KEYS)
    manifest = _typed(data, spans)
    if not _sorted(alias for _, alias in manifest.tied):
        fail("E205", "not sorted by alias", clause="3.7", field="tied")
    if not _sorted(manifest.dropped) or len(set(manifest.dropped)) != len(manifest.dropped):
        fail("E205", "not sorted, or a name twice", clause="3.7", field="dropped")
    return manifest


def _sorted(names: Iterable[str]) -> bool:
    return all(a <= b for a, b in itertools.pairwise(names))


def _typed(data: bytes, spans: dict[str, Span]) -> Manifest:
    def value(key: str) -> Json:
        return _value(data, spans[key], key)

    digests = _digests(data, spans["digests"])
    modules = _entries(data, spans["modules"], "modules", _module(digests))
    digests.finish()
    return Manifest(
        assets=_entries(data, spans["assets"], "assets", _asset),
        base=_base_identity(value("base"), "base"),
        calibration=_optional(value("calibration"), "calibration", _calibration),
        dropped=_entries(data, spans["dropped"], "dropped", _text),
        features=_array(value("features"), "features", _text),
        fine_tuned=_identity(value("fine_tuned"), "fine_tuned"),
        metadata=_metadata(data, spans["metadata"]),
        modules=modules,
        producer=_producer(value("producer"), "producer"),
        tied=_entries(data, spans["tied"], "tied", _pair),
    )


def _check_features(value: Json) -> None:
    if not isinstance(value, list) or not all(isinstance(feature, str) for feature in value):
        return  # the schema refuses it, with its path
    for feature in value:
        if feature not in FEATURES:
            fail("E204", repr(feature), field="features")
