"""Read strict JSON: UTF-8, unique keys, integers alone, bounded depth and number of values (SPEC 2.7 to 2.11).

A header may have 64 MiB, and a tree of its Python objects takes ten to thirty times as much. So no such tree is made:

check_text   checks the bounds of a whole text with a few scans in C
pieces       splits an array or object into the spans between its commas
parse_piece  parses one span
unescaped    the text of a JSON string as bytes, because a Python str may take four bytes per character
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Final, NoReturn, TypeAlias

__all__ = [
    "INTEGER_MAX",
    "PIECE_MAX",
    "STRING",
    "VALUES_MAX",
    "Json",
    "StrictJsonError",
    "check_text",
    "parse_piece",
    "parse_strict_json",
    "pieces",
    "unescaped",
]

Json: TypeAlias = "bool | int | str | list[Json] | dict[str, Json] | None"

INTEGER_MAX: Final = 2**53 - 1
_DEPTH_MAX: Final = 8
VALUES_MAX: Final = 2**22
# The longest piece that is parsed into a tree: forty times the longest record or entry.
PIECE_MAX: Final = 2**16
_BLOCK: Final = 2**16

# The inside of a string as RFC 8785, section 3.2.2.2, writes it; `STRING` captures it. Possessive, so linear.
_ESCAPES: Final = rb'\\(?:["\\bfnrt]|u00(?:0[0-7be-f]|1[0-9a-f]))'
STRING: Final = rb'"((?:[^"\\\x00-\x1f]++|' + _ESCAPES + rb')*+)"'
# Matches anything that may be a string, to find its end; a parser checks it later.
_QUOTED: Final = rb'"(?:[^"\\]++|\\.)*+"'
_TO_MARK: Final = re.compile(rb'(?:[^\[\]{}",]++|' + _QUOTED + rb")*+[\[\]{},]", re.DOTALL)
_TO_BRACKET: Final = re.compile(rb'(?:[^\[\]{}"]++|' + _QUOTED + rb")*+[\[\]{}]", re.DOTALL)
# A string, or the start of an element or member: a comma, or the bracket before the first one.
_VALUES: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|,|[\[{](?![ \t\r\n]*+[\]}])', re.DOTALL)
_OPENING: Final = b"[{"
_SPACES: Final = b" \t\r\n"
_ESCAPED_BLOCK: Final = re.compile(rb"(?:[^\\]{1,1024}+|\\(?:u....|.)){1,1024}+", re.DOTALL)
_ESCAPE: Final = re.compile(rb"\\(?:u00(..)|(.))", re.DOTALL)
_SHORT: Final = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t"}


class StrictJsonError(ValueError):
    """A violation of the strict subset. code: E113 to E118 of SPEC 8; offset: in the parsed bytes, if known."""

    def __init__(self, code: str, detail: str, offset: int | None = None) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.offset = offset


# --- a text as a whole --------------------------------------------------------------------------------


def check_text(data: bytes) -> None:
    """Check a text by SPEC 2.7 and the number of values of 2.11. Raises StrictJsonError."""
    if data.startswith(codecs.BOM_UTF8):
        raise StrictJsonError("E113", "byte order mark", 0)
    _check_utf8(data)
    # SPEC 2.11: every element and member follows a comma or an opening bracket. If there are few of these, the text
    # passes; otherwise those in strings are not counted.
    if data.count(b",") + data.count(b"[") + data.count(b"{") > VALUES_MAX:
        values = 0
        for match in _VALUES.finditer(data):
            values += data[match.start()] != 0x22
            if values > VALUES_MAX:
                raise StrictJsonError("E117", f"more than {VALUES_MAX} values", match.start())


def _check_utf8(data: bytes) -> None:
    # SPEC 2.7, block by block, because a str of the whole could take four times the file.
    if data.isascii():
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    for begin in range(0, len(data), _BLOCK):
        held = len(decoder.getstate()[0])
        try:
            decoder.decode(data[begin : begin + _BLOCK], final=begin + _BLOCK >= len(data))
        except UnicodeDecodeError as error:
            offset = begin - held + error.start
            raise StrictJsonError("E113", f"byte 0x{data[offset]:02x}", offset) from None


def pieces(data: bytes, begin: int, end: int, *, depth: int = 1) -> Iterator[tuple[int, int]]:
    """The spans between the commas of the array or object data[begin:end], at this depth.

    The inside of a span is not checked, except its brackets and their depth (SPEC 2.11).
    Raises StrictJsonError: E114 if the brackets do not match, E117.
    """
    start = at = begin + 1
    level = depth
    while level >= depth:
        found = (_TO_MARK if level == depth else _TO_BRACKET).match(data, at, end)
        if found is None:
            raise StrictJsonError("E114", "ends before its last bracket", end)
        at = found.end()
        mark = data[at - 1]
        if mark == 0x2C:  # a comma
            yield start, at - 1
            start = at
        elif mark in _OPENING:
            level += 1
            if level > _DEPTH_MAX:
                raise StrictJsonError("E117", f"depth {level}", at - 1)
        else:
            level -= 1
    if data[at:end].strip(_SPACES) or data[at - 1] != data[begin] + 2:  # `]` follows `[` and `}` follows `{` by two
        raise StrictJsonError("E114", "a bracket does not match", at - 1)
    if start > begin + 1 or data[start : at - 1].strip(_SPACES):
        yield start, at - 1


# --- one piece ----------------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    # SPEC 2.9
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise StrictJsonError("E115", repr(key[:64]))
    return unique


def _integer(text: str) -> int:
    # SPEC 2.10: 17 characters hold every integer of the range and its sign, and bound the conversion.
    if len(text) > 17 or abs(int(text)) > INTEGER_MAX:
        raise StrictJsonError("E116", text[:24])
    return int(text)


def _no_float(text: str) -> NoReturn:
    raise StrictJsonError("E116", text[:24])


def _no_constant(text: str) -> NoReturn:
    # NaN and Infinity, which Python's parser accepts, are not JSON (SPEC 2.8).
    raise StrictJsonError("E114", text)


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_integer, parse_float=_no_float, parse_constant=_no_constant
)


def parse_piece(data: bytes, begin: int = 0) -> Json:
    """The value of a text whose encoding, depth and number of values are known to be within bounds.

    begin: the offset of the text, for errors. Raises StrictJsonError (E114 to E116).
    """
    text = data.decode("utf-8")
    try:
        value: Json = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise StrictJsonError("E114", error.msg, begin + len(text[: error.pos].encode("utf-8"))) from None
    return value


def parse_strict_json(data: bytes) -> Json:
    """Parse UTF-8 JSON with unique keys, integers alone, and bounded depth and number of values.

    Raises StrictJsonError with the code of the violated clause.
    """
    check_text(data)
    bare = data.strip(_SPACES)
    if bare[:1] in (b"[", b"{"):
        for _ in pieces(bare, 0, len(bare)):
            pass  # SPEC 2.11: bounded before a recursive parser runs
    return parse_piece(data)


# --- strings ------------------------------------------------------------------------------------------


def _character(match: re.Match[bytes]) -> bytes:
    code, letter = match.groups()
    return bytes([int(code, 16)]) if code else _SHORT.get(letter, letter)


def unescaped(inside: bytes) -> bytes:
    """The UTF-8 text of a string that `STRING` matches. inside: its first group."""
    if inside.count(b"\\") == inside.count(b'\\"'):
        return inside.replace(b'\\"', b'"')  # every backslash precedes a quote
    return b"".join(_ESCAPE.sub(_character, block[0]) for block in _ESCAPED_BLOCK.finditer(inside))
