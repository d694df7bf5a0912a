"""Step 4 of SPEC 8: strict JSON, of the header and of the manifest."""

from __future__ import annotations

import json
import re
from typing import Any

from common import Rejected, Switched, need

__all__ = ["Strict"]

INT = 2**53 - 1


def values(raw: bytes) -> int:
    """SPEC 2.11: elements and members of every array and object of a text."""
    marks = re.finditer(rb'"(?:[^"\\]++|\\.)*+"?|,|[\[{](?![ \t\r\n]*+[\]}])', raw, re.DOTALL)
    return sum(raw[mark.start()] != 0x22 for mark in marks)


class Strict(Switched):
    """Parses strict JSON, with the mistake if one is set."""

    def json(self, text: str, raw: bytes, *, manifest: bool) -> Any:
        codes = ("E202",) * 4 if manifest else ("E114", "E115", "E116", "E117")
        self.depth(raw, codes[3])
        need(values(raw) <= 2**22 or self.wrong("values-unlimited"), codes[3])

        def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
            made = dict(items)
            repeated = len(made) != len(items)
            allowed = self.wrong("manifest-duplicate-keys") if manifest else self.wrong("duplicate-keys")
            if repeated and self.wrong("duplicate-records") and not manifest and "__metadata__" in made:
                allowed = True
            need(not repeated or allowed, codes[1])
            self.repeated = getattr(self, "repeated", False) or repeated
            return made

        def integer(digits: str) -> int:
            need(len(digits) <= 17 and abs(int(digits)) <= INT, codes[2])
            return int(digits)

        def number(digits: str) -> int:
            lenient = self.wrong("manifest-floats") if manifest else self.wrong("whole-floats-are-integers")
            need(lenient and float(digits).is_integer(), codes[2])
            return int(float(digits))

        def constant(word: str) -> Any:
            raise Rejected(codes[0])

        decoder = json.JSONDecoder(
            object_pairs_hook=pairs, parse_int=integer, parse_float=number, parse_constant=constant
        )
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            raise Rejected(codes[0]) from None
        need(not text[end:].strip(" ") or (self.wrong("text-after-json") and not manifest), codes[0])
        need(isinstance(value, dict), codes[0])
        return value

    @staticmethod
    def depth(raw: bytes, code: str) -> None:
        deep = 0
        for mark in re.finditer(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', raw, re.DOTALL):
            byte = raw[mark.start()]
            if byte != 0x22:
                deep += 1 if byte in b"[{" else -1
                need(deep <= 8, code)
