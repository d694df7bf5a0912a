"""A small reader of PXD files in plain Python, which is correct by default and makes one mistake on demand.

Each `self.wrong("...")` is a mistake that a loader could really make; switches.py lists them. It shares no code with
the reference library, with the generator or with the other loaders. The steps of SPEC 8, each built on the one before:

    strict.py -> container.py -> manifest.py -> rules.py -> this file (payload)
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

from common import need
from rules import Rules
from updates import Updates

__all__ = ["Reader"]


class Reader(Rules):
    """Steps 1 to 11 of SPEC 8 on one file; the result stands in the attributes."""

    def __init__(self, path: str, switch: str = "") -> None:
        self.switch = switch
        self.file = self.contents(path)
        self.records = self.container()
        self.manifest = self.profile()
        self.tensors = self.expected_tensors()
        self.payload()

    def bytes_of(self, name: str) -> bytes:
        begin, end = self.tensors[name]
        return self.file[self.start + begin : self.start + end]

    def payload(self) -> None:
        for module in self.manifest["modules"]:
            self.module_digest(module)
        for i, asset in enumerate(self.manifest["assets"]):
            right = hashlib.sha256(self.bytes_of(f"__asset__.{i}")).hexdigest() == asset["sha256"].lower()
            need(right or self.wrong("asset-digest-ignored"), "E302")
        for module in self.manifest["modules"]:
            self.gaps(module)
        for pad in self.pads:
            begin, end = pad["data_offsets"]
            need(not any(self.file[self.start + begin : self.start + end]) or self.wrong("pads-not-zero"), "E304")
        for module in self.manifest["modules"]:
            for k, part in enumerate(module["components"]):
                self.unused_bits(module, k)
                self.finite_scales(module, k, part["axis"])
            if module["encoding"] == "exact" and not self.wrong("blocks-not-checked"):
                self.updates(module).check()

    def updates(self, module: dict[str, Any]) -> Updates:
        """The blocks of an `exact` module."""
        index, data = self.part_of(module, "index"), self.part_of(module, "data")
        return Updates(index, data, math.prod(self.covered(module)), module["dtype"], self.wrong)

    def module_digest(self, module: dict[str, Any]) -> None:
        tensor = self.module_tensor(module)
        if (
            not tensor
            or self.wrong("module-digest-ignored")
            or (self.wrong("digest-of-full-only") and module["encoding"] != "full")
        ):
            return
        data = self.bytes_of(tensor[0][0])
        if self.wrong("digest-without-gaps") and module["encoding"] != "full":
            data = b"".join(data[begin:end] for _, begin, end in self.parts(module))
        need(hashlib.sha256(data).hexdigest() == (module["sha256"] or "").lower(), "E301")

    def part_of(self, module: dict[str, Any], suffix: str) -> bytes:
        """The bytes of one part of a module."""
        if suffix == "full":
            return self.bytes_of(f"{module['name']}.full")
        begin, end = {word: (begin, end) for word, begin, end in self.parts(module)}[suffix]
        return self.bytes_of(f"{module['name']}.delta")[begin:end]

    def gaps(self, module: dict[str, Any]) -> None:
        """SPEC 4.5 between the parts of a module."""
        if module["encoding"] == "full" or not self.module_tensor(module) or self.wrong("gaps-not-zero"):
            return
        data, at = self.bytes_of(f"{module['name']}.delta"), 0
        for _, begin, end in [*self.parts(module), ("", len(data), 0)]:
            need(not any(data[at:begin]), "E304")
            at = end

    def unused_bits(self, module: dict[str, Any], k: int) -> None:
        width = self.covered(module)[-1]
        mask, stride = self.part_of(module, f"{k}.mask"), -(-width // 8)
        if width % 8 and not self.wrong("unused-bits-ignored"):
            last = mask[-1:] if self.wrong("unused-bits-of-last-row-only") else mask[stride - 1 :: stride]
            need(all(byte >> width % 8 == 0 for byte in last), "E303")

    def finite_scales(self, module: dict[str, Any], k: int, axis: str) -> None:
        if k and self.wrong("scales-of-first-component-only"):
            return
        words = {"row+col": ["row", "col"], "tensor": ["scalar"]}.get(axis, [axis])
        for word in words:
            if word == "col" and self.wrong("columns-not-checked"):
                continue
            raw = self.part_of(module, f"{k}.{word}")
            for i in range(0, len(raw), 2):
                bits = raw[i] | raw[i + 1] << 8
                magnitude = bits & 0x7FFF
                need(
                    magnitude < 0x7C00
                    or (magnitude == 0x7C00 and self.wrong("infinite-scales"))
                    or (magnitude > 0x7C00 and self.wrong("not-a-number-scales")),
                    "E305",
                )
                need(
                    bits < 0x8000
                    or self.wrong("negative-scales")
                    or (bits == 0x8000 and self.wrong("minus-zero-scales")),
                    "E306",
                )
