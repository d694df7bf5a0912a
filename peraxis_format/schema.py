"""Bytes -> a typed manifest (SPEC 3.1 to 3.4). Each function takes (value, path) and fails with E205 at the path."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, TypeVar

from peraxis_format.canonical import Json, StrictJsonError, canonical_json, parse_strict_json
from peraxis_format.delta import Axis, BaseRef, Encoding
from peraxis_format.dtypes import DType
from peraxis_format.errors import fail
from peraxis_format.manifest import (
    FEATURES,
    Asset,
    BaseIdentity,
    Calibration,
    ComponentEntry,
    Identity,
    Manifest,
    ModuleEntry,
    Producer,
)

__all__ = ["parse_manifest"]

_HEX: Final = re.compile(r"[0-9a-f]{64}")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")

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
    fields = _object(value, path, "base components dtype encoding name sha256 shape")
    return ModuleEntry(
        name=_text(fields["name"], f"{path}.name"),
        shape=_array(fields["shape"], f"{path}.shape", _natural),
        dtype=_dtype(fields["dtype"], f"{path}.dtype"),
        encoding=_one_of(Encoding, fields["encoding"], f"{path}.encoding"),
        components=_array(fields["components"], f"{path}.components", _component),
        sha256=_optional(fields["sha256"], f"{path}.sha256", _hex),
        base=_optional(fields["base"], f"{path}.base", _base_ref),
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


def _metadata(value: Json, path: str) -> dict[str, str]:
    if not isinstance(value, dict):
        fail("E205", "not an object", field=path)
    return {key: _text(text, f"{path}[{key!r}]") for key, text in value.items()}


_KEYS: Final = "assets base calibration dropped features fine_tuned metadata modules producer tied"


def parse_manifest(data: bytes) -> Manifest:
    """Parse the manifest's bytes into typed values (SPEC 3.1 to 3.4, 3.7).

    Raises ProfileError (E202, E203, E205) or UnsupportedError (E204).
    """
    try:
        value = parse_strict_json(data)
    except StrictJsonError as error:
        fail("E202", error.detail, field="manifest")  # SPEC 3.1
    if _canonical_or_none(value) != data:
        fail("E203", field="manifest")  # SPEC 3.2
    if isinstance(value, dict):
        # SPEC 3.3: before the schema, since a feature may bring keys that this reader does not know.
        _check_features(value.get("features"))
    fields = _object(value, "manifest", _KEYS)
    manifest = Manifest(
        assets=_array(fields["assets"], "assets", _asset),
        base=_base_identity(fields["base"], "base"),
        calibration=_optional(fields["calibration"], "calibration", _calibration),
        dropped=_array(fields["dropped"], "dropped", _text),
        features=_array(fields["features"], "features", _text),
        fine_tuned=_identity(fields["fine_tuned"], "fine_tuned"),
        metadata=_metadata(fields["metadata"], "metadata"),
        modules=_array(fields["modules"], "modules", _module),
        producer=_producer(fields["producer"], "producer"),
        tied=_array(fields["tied"], "tied", _pair),
    )
    for path, names in (("tied", [alias for _, alias in manifest.tied]), ("dropped", list(manifest.dropped))):
        if names != sorted(names):
            fail("E205", "not sorted", field=path)  # SPEC 3.7
    return manifest


def _canonical_or_none(value: Json) -> bytes | None:
    try:
        return canonical_json(value)
    except UnicodeEncodeError:
        return None  # an unpaired surrogate has no canonical form


def _check_features(value: Json) -> None:
    if not isinstance(value, list) or not all(isinstance(feature, str) for feature in value):
        return  # the schema refuses it, with its path
    for feature in value:
        if feature not in FEATURES:
            fail("E204", repr(feature), field="features")
