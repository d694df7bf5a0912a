"""The file of a base (SPEC 7.5)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import BITS, Rejected, compact, need
from strict import Strict

__all__ = ["MALFORMED", "Tensors", "read_base"]

Tensors = dict[str, tuple[str, list[int], bytes]]
MALFORMED = ""  # in the place of a code
SPACES = b" \t\r\n"
KEYS = {"dtype", "shape", "data_offsets"}
# A mistake with bases -> the same one with deltas.
LIKE = {"base-keys-twice": "duplicate-keys", "base-whole-floats": "whole-floats-are-integers"}


class BaseFile(Strict):
    """tensors: all of the file, those that no manifest names too."""

    def __init__(self, path: str, switch: str) -> None:
        self.switch = LIKE.get(switch, switch)
        need(Path(path).is_file(), MALFORMED)
        self.file = Path(path).read_bytes()
        need(len(self.file) >= 8, MALFORMED)
        length = int.from_bytes(self.file[:8], "little")
        need(length <= len(self.file) - 8 or self.wrong("base-header-cut"), MALFORMED)
        need(length <= 10**8, MALFORMED)
        self.start = 8 + length
        header = self.header(self.file[8 : self.start])
        metadata = header.pop("__metadata__", {})
        if self.wrong("base-metadata-of-texts"):
            need(isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()), MALFORMED)
        if not self.wrong("base-others-not-checked"):
            for record in header.values():
                self.record(record)
            self.cover(sorted(record["data_offsets"] for record in header.values()))
        self.tensors: Tensors = {name: self.tensor(record) for name, record in header.items()}

    def header(self, raw: bytes) -> dict[str, Any]:
        if self.wrong("base-json-of-python"):
            return dict(json.loads(raw.decode()))
        if self.wrong("base-encoding-guessed"):
            raw = raw.decode(json.detect_encoding(raw)).encode()
        try:
            text = raw.decode("utf-8", "replace" if self.wrong("base-utf8-replaced") else "strict")
            bare = text if self.wrong("base-begins-with-bracket") else text.strip(SPACES.decode())
            made: dict[str, Any] = self.json(bare, raw, manifest=False)
            whole = json.dumps(made, ensure_ascii=False).encode()
        except UnicodeError:
            need(self.wrong("base-surrogates"), MALFORMED)
            return made
        except Rejected:
            raise Rejected(MALFORMED) from None
        need(not self.wrong("base-header-as-we-write") or compact(json.loads(whole)).encode() == raw, MALFORMED)
        return made

    def record(self, record: Any) -> None:
        need(isinstance(record, dict) and set(record) >= KEYS, MALFORMED)
        need(set(record) == KEYS or not self.wrong("base-no-more-keys"), MALFORMED)
        dtype, shape, span = record["dtype"], record["shape"], record["data_offsets"]
        need(isinstance(dtype, str) and isinstance(shape, list) and isinstance(span, list), MALFORMED)
        need(len(span) == 2 and all(type(value) is int and value >= 0 for value in shape + span), MALFORMED)
        need(len(shape) <= 64 or self.wrong("base-dimensions-unlimited"), MALFORMED)
        need(not self.wrong("base-as-strict-as-a-delta") or (len(shape) <= 8 and all(shape)), MALFORMED)
        size = span[1] - span[0]
        need(size >= 0 or self.wrong("base-offsets-reversed"), MALFORMED)
        need(dtype not in BITS or self.size(dtype, shape) == size or self.wrong("base-sizes-ignored"), MALFORMED)

    def cover(self, spans: list[list[int]]) -> None:
        """Each byte of the data belongs to one tensor."""
        at = 0
        for begin, end in spans:
            need(begin >= at or self.wrong("base-overlaps"), MALFORMED)
            need(begin <= at or self.wrong("base-gaps"), MALFORMED)
            at = max(at, end) if self.wrong("base-overlaps") else end
        held = len(self.file[self.start :])
        need(at >= held or self.wrong("base-bytes-behind"), MALFORMED)
        need(at <= held or self.wrong("base-cut"), MALFORMED)

    def tensor(self, record: dict[str, Any]) -> tuple[str, list[int], bytes]:
        begin, end = record["data_offsets"]
        return record["dtype"], record["shape"], self.file[self.start + begin : self.start + end]


def read_base(path: str, switch: str) -> Tensors:
    return BaseFile(path, switch).tensors
