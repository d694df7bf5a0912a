"""Parse bytes into a typed manifest (SPEC 3.1 to 3.4), entry by entry, so that no tree of JSON is in memory."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from json.encoder import encode_basestring
from typing import Final, TypeVar

from peraxis_format.digest_table import DigestReader
from peraxis_format.errors import fail
from peraxis_format.manifest import ENTRIES_MAX, EXACT_FEATURE, FEATURES, METADATA_MAX, Manifest
from peraxis_format.schema_types import (
    array,
    asset,
    base_identity,
    calibration,
    digest,
    identity,
    module,
    object_of,
    optional,
    pair,
    producer,
    text,
)
from peraxis_format.strict_json import PIECE_MAX, Json, StrictJsonError, check_text, parse_piece, pieces

__all__ = ["parse_manifest"]

_KEY: Final = re.compile(rb'("(?:[^"\\]++|\\.)*+"):', re.DOTALL)
# The canonical form of a piece. Keys beyond ASCII, whose order differs from that of UTF-16, are not allowed in one.
_CANONICAL: Final = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))

T = TypeVar("T")

# --- the manifest's text, piece by piece --------------------------------------------------------------

Span = tuple[int, int]


def _value(data: bytes, span: Span, path: str, most: int = PIECE_MAX) -> Json:
    """The value of one piece, checked by SPEC 3.1 and 3.2."""
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


def _members(data: bytes, span: Span, path: str, depth: int, most: int = PIECE_MAX) -> Iterator[tuple[str, Span]]:
    """The key and the span of the value of each member of an object, checked by SPEC 2.9 and 3.2.

    most: the bytes of the longest key that is possible.
    """
    before, canonical = b"", True
    for i, (begin, end) in enumerate(pieces(data, *span, depth=depth)):
        if i >= ENTRIES_MAX:
            fail("E208", f"more than {ENTRIES_MAX} members", field=path)  # SPEC 3.8
        match = _KEY.match(data, begin, min(end, begin + most))
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
    """A list of the manifest; each entry is typed before the next one is parsed."""
    if data[span[0]] != 0x5B:  # not an array
        return array(_value(data, span, path), path, item)

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
    for key, value in _members(data, span, "metadata", depth=2, most=METADATA_MAX):
        path = f"metadata[{key[:64]!r}]"
        texts[key] = text(_value(data, value, path, METADATA_MAX if data[value[0]] == 0x22 else PIECE_MAX), path)
    return texts


def _digests(data: bytes, span: Span) -> DigestReader:
    begin, end = span
    if data[begin] != 0x22:
        text(_value(data, span, "digests"), "digests")
    # A string that is not canonical is not base64 either.
    return DigestReader(data[begin + 1 : end - 1])


_KEYS: Final = "assets base calibration digests dropped features fine_tuned metadata modules producer tied"
_CHAIN_KEYS: Final = " previous result"


def parse_manifest(data: bytes) -> Manifest:
    """Parse the manifest's bytes into typed values (SPEC 3.1 to 3.4, 3.7, 3.13, and the lengths of 3.8).

    Raises ProfileError (E202, E203, E205, E208, E213) or UnsupportedError (E204).
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
        # SPEC 3.3: check features before the schema, because a feature may add keys that this reader does not know.
        _check_features(_value(data, spans["features"], "features"))
    # SPEC 3.14: the fields of a chain are there exactly with the feature.
    chained = "features" in spans and _value(data, spans["features"], "features") == [EXACT_FEATURE]
    object_of(dict.fromkeys(spans), "manifest", _KEYS + _CHAIN_KEYS * chained)
    manifest = _typed(data, spans, chained=chained)
    if not _sorted(alias for _, alias in manifest.tied):
        fail("E205", "not sorted by alias", clause="3.7", field="tied")
    if not _sorted(manifest.dropped) or len(set(manifest.dropped)) != len(manifest.dropped):
        fail("E205", "not sorted, or a name twice", clause="3.7", field="dropped")
    return manifest


def _sorted(names: Iterable[str]) -> bool:
    return all(a <= b for a, b in itertools.pairwise(names))


def _typed(data: bytes, spans: dict[str, Span], *, chained: bool) -> Manifest:
    def value(key: str) -> Json:
        return _value(data, spans[key], key)

    digests = _digests(data, spans["digests"])
    modules = _entries(data, spans["modules"], "modules", module(digests))
    digests.finish()
    return Manifest(
        assets=_entries(data, spans["assets"], "assets", asset),
        base=base_identity(value("base"), "base"),
        calibration=optional(value("calibration"), "calibration", calibration),
        dropped=_entries(data, spans["dropped"], "dropped", text),
        features=array(value("features"), "features", text),
        fine_tuned=identity(value("fine_tuned"), "fine_tuned"),
        metadata=_metadata(data, spans["metadata"]),
        modules=modules,
        producer=producer(value("producer"), "producer"),
        tied=_entries(data, spans["tied"], "tied", pair),
        previous=optional(value("previous"), "previous", digest) if chained else None,
        result=optional(value("result"), "result", digest) if chained else None,
    )


def _check_features(value: Json) -> None:
    if not isinstance(value, list) or not all(isinstance(feature, str) for feature in value):
        return  # the schema refuses it, with its path
    for feature in value:
        if feature not in FEATURES:
            fail("E204", repr(feature), field="features")
    if value != sorted(set(map(str, value))):
        fail("E205", "not sorted, or one twice", clause="3.3", field="features")
