"""Write canonical JSON: the subset of RFC 8785 without floats (SPEC 3.2). strict_json.py reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from json.encoder import encode_basestring

from peraxis_format.strict_json import INTEGER_MAX, Json

__all__ = ["canonical_json"]


def _write(value: Json, out: Callable[[str], object]) -> None:
    if value is None or isinstance(value, bool):
        out({None: "null", True: "true", False: "false"}[value])
    elif isinstance(value, int):
        if abs(value) > INTEGER_MAX:
            raise ValueError(f"{value} is not an integer of magnitude below 2^53")
        out(str(value))
    elif isinstance(value, str):
        out(encode_basestring(value))
    elif isinstance(value, Mapping):
        for i, key in enumerate(sorted(value, key=lambda text: text.encode("utf-16-be", "surrogatepass"))):
            out("," if i else "{")
            out(encode_basestring(key))
            out(":")
            _write(value[key], out)
        out("}" if value else "{}")
    elif isinstance(value, Sequence):
        for i, item in enumerate(value):
            out("," if i else "[")
            _write(item, out)
        out("]" if value else "[]")
    else:
        raise TypeError(f"{type(value).__name__} has no canonical JSON here")


def canonical_json(value: Json) -> bytes:
    """Write canonical JSON: RFC 8785 over null, booleans, integers, strings, arrays and objects.

    Raises TypeError for other types (also floats), ValueError for integers beyond 2^53 - 1 and
    UnicodeEncodeError (a ValueError) for unpaired surrogates.
    """
    parts: list[str] = []
    _write(value, parts.append)
    return "".join(parts).encode("utf-8")
