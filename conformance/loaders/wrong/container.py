"""Steps 1 to 6 of SPEC 8: the file, its header and its records."""

from __future__ import annotations

import os
import stat
from typing import Any

from common import BITS, Rejected, compact, need, quoted
from strict import Strict

__all__ = ["Container"]

MAGIC = b'{"__metadata__":{"format":"pxd","pxd":"'


def wrapped(value: int) -> int:
    return value % 2**64


class Container(Strict):
    """The results of the steps: file, start, text (of the manifest)."""

    file: bytes

    def contents(self, path: str) -> bytes:
        about = os.stat(path)
        need(stat.S_ISREG(about.st_mode), "E101")
        need(about.st_size < 2**53 or self.wrong("size-limit-ignored"), "E102")
        if about.st_size >= 2**53:
            raise MemoryError
        with open(path, "rb") as stream:
            return stream.read()

    def kind(self) -> None:
        data = self.file
        need(data, "E103")
        need(not data.startswith(b"version https://git-lfs"), "E104")
        need(not data.lstrip(b" \t\r\n\f\v").lower().startswith((b"<!doctype", b"<html")), "E105")
        need(not data.startswith(b"PK"), "E106")
        need(not (data[0] == 0x80 and data[1:2] in (b"\2", b"\3", b"\4", b"\5")), "E107")
        need(data[:8].strip(b"\0"), "E108")
        need(data[0] == 0xF8 or self.wrong("page-size-ignored"), "E112" if data[8:9] == b"{" else "E109")
        need(len(data) >= 4096 or self.wrong("page-size-ignored"), "E103")

    def container(self) -> list[dict[str, Any]]:
        self.kind()
        length = int.from_bytes(self.file[:8], "little")
        if self.wrong("length-in-32-bits"):
            length %= 2**32
        need((8 + length) % 4096 == 0 or self.wrong("page-size-ignored"), "E110")
        need(
            4088 <= length <= 2**26
            or self.wrong("length-limit-ignored")
            or (self.wrong("page-size-ignored") and length < 4088),
            "E110",
        )
        need(8 + length <= len(self.file), "E111")
        self.start = 8 + length
        raw = self.file[8 : self.start]
        if not self.wrong("magic-by-parsing"):
            need(raw.startswith(MAGIC), "E112")
            if not self.wrong("version-after-json"):
                self.version(raw[len(MAGIC) :].partition(b'"')[0])
        try:
            text = raw.decode("utf-8", "replace" if self.wrong("utf8-replaced") else "strict")
        except UnicodeDecodeError:
            raise Rejected("E113") from None
        header = self.json(text, raw, manifest=False)
        records = self.header_records(header)
        if not (
            self.wrong("header-not-canonical")
            or self.wrong("magic-by-parsing")
            or self.wrong("utf8-replaced")
            or self.wrong("text-after-json")
        ):
            self.header_canonical(header, records, raw)
        return self.extents(records)

    def version(self, version: bytes) -> None:
        if self.wrong("version-ignored"):
            return
        if self.wrong("minor-version-ignored") and version.startswith(b"1."):
            return
        if self.wrong("version-parsed"):
            try:
                need(float(version) == 1, "E201")
                return
            except ValueError:
                raise Rejected("E201") from None
        need(version == b"1.0", "E201")

    def header_records(self, header: dict[str, Any]) -> list[dict[str, Any]]:
        given = header.get("__metadata__")
        need(isinstance(given, dict), "E118")
        metadata: dict[str, Any] = given or {}
        keys = {"format", "pxd", "manifest"}
        need(set(metadata) == keys or (self.wrong("metadata-keys-ignored") and keys <= set(metadata)), "E118")
        need(all(isinstance(value, str) for value in metadata.values()), "E118")
        if self.wrong("magic-by-parsing"):
            need(metadata["format"] == "pxd", "E112")
        if self.wrong("magic-by-parsing") or self.wrong("version-after-json"):
            self.version(metadata["pxd"].encode())
        self.text = metadata["manifest"]
        made = []
        for name, record in header.items():
            if name != "__metadata__":
                self.record(record)
                need(len(name.encode("utf-8", "replace")) <= 1024 or self.wrong("record-name-any-length"), "E118")
                made.append({"name": name, **record})
        return made

    def record(self, record: Any) -> None:
        keys = {"dtype", "shape", "data_offsets"}
        need(isinstance(record, dict), "E118")
        need(set(record) == keys or (self.wrong("record-keys-ignored") and keys <= set(record)), "E118")
        dtype, shape, span = record["dtype"], record["shape"], record["data_offsets"]
        need(isinstance(dtype, str) and isinstance(shape, list) and isinstance(span, list) and len(span) == 2, "E118")
        integer: Any = (lambda x: isinstance(x, int)) if self.wrong("true-is-one") else (lambda x: type(x) is int)
        need(all(map(integer, shape + span)), "E118")
        need(dtype in BITS or self.wrong("dtype-unknown-is-bytes"), "E119")
        need(len(shape) <= 8 or self.wrong("nine-dimensions"), "E120")
        least = 0 if self.wrong("empty-tensors") else 1
        need(all(size >= least for size in shape), "E120")
        total = self.size(dtype, shape)
        if total is None:
            raise Rejected("E120")
        if self.wrong("product-wraps"):
            total = wrapped(total)
        need(total < 2**53, "E120")
        need(span[0] >= 0 and (span[1] - span[0] == total or self.wrong("offsets-not-compared")), "E121")

    def header_canonical(self, header: dict[str, Any], records: list[dict[str, Any]], raw: bytes) -> None:
        entries = ['{"__metadata__":{"format":"pxd","pxd":"1.0","manifest":' + quoted(self.text) + "}"]
        if (
            self.wrong("metadata-keys-ignored")
            or self.wrong("record-keys-ignored")
            or self.wrong("version-ignored")
            or self.wrong("minor-version-ignored")
            or self.wrong("version-parsed")
            or getattr(self, "repeated", False)
        ):
            return
        for record in records:
            fields = (
                f'"dtype":{quoted(record["dtype"])}',
                f'"shape":{compact(record["shape"])}',
                f'"data_offsets":{compact(record["data_offsets"])}',
            )
            entries.append(quoted(record["name"]) + ":{" + ",".join(fields) + "}")
        try:
            written = (",".join(entries) + "}").encode()
        except UnicodeEncodeError:
            raise Rejected("E122") from None
        if self.wrong("header-padding-free") or self.wrong("page-size-ignored"):
            need(raw.rstrip(b" ") == written, "E122")
        elif self.wrong("whole-floats-are-integers") and b"." in raw:
            return
        else:
            need(raw == written + b" " * (-(8 + len(written)) % 4096), "E122")

    def extents(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.wrong("any-order"):
            records = sorted(records, key=lambda record: record["data_offsets"][0])
        end = 0
        for record in records:
            begin = record["data_offsets"][0]
            need(begin == end or self.wrong("gaps"), "E123")
            end = record["data_offsets"][1]
        held = len(self.file) - self.start
        need(held >= end or self.wrong("truncated"), "E124")
        need(held <= end or self.wrong("trailing-bytes"), "E125")
        return records
