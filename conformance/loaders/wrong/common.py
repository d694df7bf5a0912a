"""Code that all steps of the small reader share."""

from __future__ import annotations

import json
import re
from typing import Any

from switches import SWITCHES

__all__ = ["FLOATS", "Rejected", "SIZES", "Switched", "compact", "need", "phase_of", "quoted"]

SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
FLOATS = ("BF16", "F16", "F32")
ESCAPES = {8: "\\b", 9: "\\t", 10: "\\n", 12: "\\f", 13: "\\r", 0x22: '\\"', 0x5C: "\\\\"}
SPECIAL = re.compile(r'[\x00-\x1f"\\]')


class Rejected(Exception):  # noqa: N818  the word of the protocol
    """The file is refused; the argument is a code of SPEC 8."""


def phase_of(code: str) -> str:
    """SPEC 8."""
    return {"1": "container", "2": "profile", "3": "payload", "4": "binding"}[code[1]]


def need(holds: object, code: str) -> None:
    if not holds:
        raise Rejected(code)


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def quoted(text: str) -> str:
    return '"' + SPECIAL.sub(lambda m: ESCAPES.get(ord(m[0])) or f"\\u{ord(m[0]):04x}", text) + '"'


class Switched:
    """A base class that can make one mistake; `switch` names it, or is empty."""

    switch: str

    def wrong(self, name: str) -> bool:
        """Whether to make this mistake."""
        if name not in SWITCHES:
            raise KeyError(name)
        return self.switch == name
