"""Turn parsed values of the manifest's JSON into its types (SPEC 3.4).

Each function takes (value, path) and fails with E205 at the path.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, TypeVar

from peraxis_format.delta import Axis, BaseRef, Encoding
from peraxis_format.digest_table import DigestReader
from peraxis_format.dtypes import DType
from peraxis_format.errors import fail
from peraxis_format.manifest import (
    Asset,
    BaseIdentity,
    Calibration,
    ComponentEntry,
    Identity,
    ModuleEntry,
    Producer,
)
from peraxis_format.strict_json import Json

__all__ = [
    "array",
    "asset",
    "base_identity",
    "calibration",
    "digest",
    "identity",
    "module",
    "object_of",
    "optional",
    "pair",
    "producer",
    "text",
]

_HEX: Final = re.compile(r"[0-9a-f]{64}")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")

T = TypeVar("T")
E = TypeVar("E", Axis, DType, Encoding)


def object_of(value: Json, path: str, keys: str, optional: str = "") -> dict[str, Json]:
    if not isinstance(value, dict):
        fail("E205", "not an object", field=path)
    wanted = set(keys.split())
    for key in sorted(value.keys() - wanted - set(optional.split())):
        fail("E205", f"unknown key {key!r}", field=path)
    for key in sorted(wanted - value.keys()):
        fail("E205", f"missing key {key!r}", field=path)
    return value


def array(value: Json, path: str, item: Callable[[Json, str], T]) -> tuple[T, ...]:
    if not isinstance(value, list):
        fail("E205", "not an array", field=path)
    return tuple(item(element, f"{path}[{i}]") for i, element in enumerate(value))


def text(value: Json, path: str) -> str:
    if not isinstance(value, str):
        fail("E205", "not a string", field=path)
    return value


def optional(value: Json, path: str, item: Callable[[Json, str], T]) -> T | None:
    return None if value is None else item(value, path)


def _integer(value: Json, path: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        fail("E205", "not an integer", field=path)
    return value


def natural(value: Json, path: str) -> int:
    number = _integer(value, path)
    if number < 0:
        fail("E205", f"{number} is negative", field=path)
    return number


def _matching(pattern: re.Pattern[str], what: str) -> Callable[[Json, str], str]:
    def item(value: Json, path: str) -> str:
        found = text(value, path)
        if not pattern.fullmatch(found):
            fail("E205", f"not {what}", field=path)
        return found

    return item


_hex = _matching(_HEX, "64 lower-case hex digits")
digest = _matching(_DIGEST, "sha256: and 64 lower-case hex digits")


def _one_of(kind: type[E], value: Json, path: str) -> E:
    word = text(value, path)
    try:
        return kind(word)
    except ValueError:
        fail("E205", f"unknown {kind.__name__.lower()} {word!r}", field=path)


def _dtype(value: Json, path: str) -> DType:
    return _one_of(DType, value, path)


def _component(value: Json, path: str) -> ComponentEntry:
    if not isinstance(value, list) or len(value) != 2:
        fail("E205", "not a pair of axis and exponent", field=path)
    return ComponentEntry(axis=_one_of(Axis, value[0], f"{path}[0]"), exponent=_integer(value[1], f"{path}[1]"))


def _encoding(fields: dict[str, Json], path: str) -> Encoding:
    # SPEC 3.4: `components` say that it is `sign`.
    if ("components" in fields) == ("encoding" in fields):
        fail("E205", "needs exactly one of components and encoding", field=path)
    if "components" in fields:
        return Encoding.SIGN
    encoding = _one_of(Encoding, fields["encoding"], f"{path}.encoding")
    if encoding is Encoding.SIGN:
        fail("E205", "sign is not written out", field=f"{path}.encoding")
    return encoding


def _size(fields: dict[str, Json], path: str, encoding: Encoding) -> int | None:
    # SPEC 3.4: only for an `exact` module.
    if ("size" in fields) != (encoding is Encoding.EXACT):
        fail("E205", "only exact has a size", field=path)
    return natural(fields["size"], f"{path}.size") if "size" in fields else None


def module(digests: DigestReader) -> Callable[[Json, str], ModuleEntry]:
    """Parse a module's entry; its digests are taken in order."""

    def item(value: Json, path: str) -> ModuleEntry:
        fields = object_of(value, path, "name shape", optional="base components dtype encoding size")
        shape = array(fields["shape"], f"{path}.shape", natural)
        dtype = DType.BF16
        if "dtype" in fields:
            dtype = _dtype(fields["dtype"], f"{path}.dtype")
            if dtype is DType.BF16:
                fail("E205", "BF16 is not written out", field=f"{path}.dtype")  # SPEC 3.4
        encoding = _encoding(fields, path)
        size = _size(fields, path, encoding)
        base = _base_ref(fields, path, dtype, shape, digests)
        tail = base is not None and len(shape) > 0 and len(base.shape) > 0 and shape[0] > base.shape[0]
        return ModuleEntry(
            name=text(fields["name"], f"{path}.name"),
            shape=shape,
            dtype=dtype,
            encoding=encoding,
            components=array(fields.get("components", []), f"{path}.components", _component),
            sha256=digests.take() if tail or encoding is not Encoding.SAME else None,
            base=base,
            size=size,
            result=digests.take() if encoding is Encoding.EXACT else None,
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
    said = object_of(fields["base"], path, "dtype shape")
    base = BaseRef(
        dtype=_dtype(said["dtype"], f"{path}.dtype"),
        shape=array(said["shape"], f"{path}.shape", natural),
        sha256=digests.take(),
    )
    if (base.dtype, base.shape) == (dtype, shape):
        fail("E205", "a base like the module is not written out", field=path)  # SPEC 3.4
    return base


def asset(value: Json, path: str) -> Asset:
    fields = object_of(value, path, "path sha256")
    return Asset(path=text(fields["path"], f"{path}.path"), sha256=_hex(fields["sha256"], f"{path}.sha256"))


def pair(value: Json, path: str) -> tuple[str, str]:
    names = array(value, path, text)
    if len(names) != 2:
        fail("E205", "not a pair of names", field=path)
    return names[0], names[1]


def calibration(value: Json, path: str) -> Calibration:
    fields = object_of(value, path, "digest samples seed sequence_length source")
    return Calibration(
        digest=digest(fields["digest"], f"{path}.digest"),
        samples=natural(fields["samples"], f"{path}.samples"),
        seed=natural(fields["seed"], f"{path}.seed"),
        sequence_length=natural(fields["sequence_length"], f"{path}.sequence_length"),
        source=text(fields["source"], f"{path}.source"),
    )


def identity(value: Json, path: str) -> Identity:
    fields = object_of(value, path, "id revision")
    return Identity(
        id=text(fields["id"], f"{path}.id"), revision=optional(fields["revision"], f"{path}.revision", text)
    )


def base_identity(value: Json, path: str) -> BaseIdentity:
    fields = object_of(value, path, "digest id revision")
    return BaseIdentity(
        digest=digest(fields["digest"], f"{path}.digest"),
        id=text(fields["id"], f"{path}.id"),
        revision=optional(fields["revision"], f"{path}.revision", text),
    )


def producer(value: Json, path: str) -> Producer:
    fields = object_of(value, path, "name version")
    return Producer(name=text(fields["name"], f"{path}.name"), version=text(fields["version"], f"{path}.version"))
