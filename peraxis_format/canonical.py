"""Strict JSON in, canonical JSON out: the subset of RFC 8785 without floats (SPEC 2.7 to 2.11, 3.2)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from json.encoder import encode_basestring
from typing import Final, NoReturn, TypeAlias

__all__ = ["INTEGER_MAX", "Json", "StrictJsonError", "canonical_json", "parse_strict_json"]

Json: TypeAlias = "bool | int | str | list[Json] | dict[str, Json] | None"

INTEGER_MAX: Final = 2**53 - 1
_DEPTH_MAX: Final = 8
# A record of the header takes 44 bytes and more for three containers, the manifest's shortest (a pair of `tied`)
# 10 for one. What spends less is a bomb of `[]`, which would take thirty times its size once parsed.
_CONTAINER_BYTES: Final = 8
# A string (an unterminated one runs to the end, so that the scan stays linear), or a bracket outside of strings.
_BRACKETS: Final = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


class StrictJsonError(ValueError):
    """A violation of the strict subset. code: E113 to E118 of SPEC 8; offset: in the parsed bytes, if known."""

    def __init__(self, code: str, detail: str, offset: int | None = None) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.offset = offset


def _check_depth(data: bytes) -> None:
    # SPEC 2.11: bounded by a linear scan, before a recursive parser runs.
    depth = containers = 0
    most = (len(data) + 4096) // _CONTAINER_BYTES
    for match in _BRACKETS.finditer(data):
        if match[0] in b"[{":
            depth += 1
            containers += 1
            if containers > most:
                raise StrictJsonError("E118", f"{containers} arrays and objects so far", match.start())
            if depth > _DEPTH_MAX:
                raise StrictJsonError("E117", f"depth {depth}", match.start())
        elif match[0] in b"]}":
            depth -= 1


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    # SPEC 2.9
    unique: dict[str, Json] = {}
    for key, value in pairs:
        if key in unique:
            raise StrictJsonError("E115", repr(key))
        unique[key] = value
    return unique


def _integer(text: str) -> int:
    # SPEC 2.10: 17 characters hold every integer of the range and its sign, and bound the conversion.
    if len(text) > 17 or abs(int(text)) > INTEGER_MAX:
        raise StrictJsonError("E116", text[:24])
    return int(text)


def _no_float(text: str) -> NoReturn:
    raise StrictJsonError("E116", text[:24])


def parse_strict_json(data: bytes) -> Json:
    """Parse UTF-8 JSON with unique keys, integers alone, and bounded depth.

    Raises StrictJsonError with the code of the violated clause. Trailing spaces must have been cut off.
    """
    if data.startswith(b"\xef\xbb\xbf"):
        raise StrictJsonError("E113", "byte order mark", 0)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StrictJsonError("E113", f"byte 0x{data[error.start]:02x}", error.start) from None
    _check_depth(data)
    try:
        value: Json = json.loads(
            text, object_pairs_hook=_unique, parse_int=_integer, parse_float=_no_float, parse_constant=_no_float
        )
    except json.JSONDecodeError as error:
        offset = len(text[: error.pos].encode("utf-8"))
        raise StrictJsonError("E114", error.msg, offset) from None
    return value


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

    Raises TypeError for anything else (floats among it), ValueError for integers beyond 2^53 - 1 and
    UnicodeEncodeError (a ValueError) for unpaired surrogates.
    """
    parts: list[str] = []
    _write(value, parts.append)
    return "".join(parts).encode("utf-8")
