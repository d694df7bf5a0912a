"""Code that all steps of the small reader share."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from switches import SWITCHES

__all__ = ["BITS", "FLOATS", "Rejected", "Switched", "compact", "need", "phase_of", "quoted"]

BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
FLOATS = ("BF16", "F16", "F32")
ESCAPES = {8: "\\b", 9: "\\t", 10: "\\n", 12: "\\f", 13: "\\r", 0x22: '\\"', 0x5C: "\\\\"}
SPECIAL = re.compile(r'[\x00-\x1f"\\]')


class Rejected(Exception):  # noqa: N818  the word of the protocol
    """The file is refused; the argument is a code of SPEC 8, or empty for a malformed base."""


def phase_of(code: str) -> str | None:
    """SPEC 8; None for a malformed base, which has no code."""
    return {"1": "container", "2": "profile", "3": "payload", "4": "binding"}[code[1]] if code else None


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

    def size(self, dtype: str, shape: list[int]) -> int | None:
        """The bytes of a tensor; None if they are not a whole number (SPEC 2.14)."""
        bits = math.prod(shape) * BITS.get(dtype, 8)
        if bits % 8 and self.wrong("half-bytes-rounded"):
            return bits // 8 + 1
        return None if bits % 8 else bits // 8
