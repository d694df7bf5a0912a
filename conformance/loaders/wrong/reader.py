"""A small reader of PXD files in plain Python, right as it stands and wrong in one way on demand.

Each `self.wrong("...")` is a mistake that a loader could really make; `SWITCHES` lists them with the clause that
they break. It shares no code with the reference library, with the generator or with the other loaders.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from typing import Any

__all__ = ["SWITCHES", "Reader", "Rejected", "phase_of"]

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
MAGIC = b'{"__metadata__":{"format":"pxd","pxd":"'
INT = 2**53 - 1
HEX = re.compile(r"[0-9a-f]{64}")
NAME = re.compile(r"(?!__)[!-.0-\[\]-~]{1,512}")
ASSET = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,118}\.(json|txt|model|jinja|tiktoken|md)"

SWITCHES = {
    # Container.
    "size-limit-ignored": "2.1",
    "page-size-ignored": "2.3",
    "length-limit-ignored": "2.3",
    "length-in-32-bits": "2.3",
    "magic-by-parsing": "2.5",
    "version-ignored": "2.6",
    "minor-version-ignored": "2.6",
    "version-parsed": "2.6",
    "version-after-json": "2.6",
    "utf8-replaced": "2.7",
    "text-after-json": "2.8",
    "duplicate-keys": "2.9",
    "duplicate-records": "2.9",
    "whole-floats-are-integers": "2.10",
    "values-unlimited": "2.11",
    "record-keys-ignored": "2.12",
    "record-name-any-length": "2.12",
    "metadata-keys-ignored": "2.12",
    "true-is-one": "2.12",
    "dtype-unknown-is-bytes": "2.13",
    "empty-tensors": "2.14",
    "product-wraps": "2.14",
    "nine-dimensions": "2.14",
    "offsets-not-compared": "2.15",
    "header-not-canonical": "2.16",
    "header-padding-free": "2.16",
    "gaps": "2.17",
    "any-order": "2.17",
    "truncated": "2.18",
    "trailing-bytes": "2.18",
    # Profile.
    "manifest-duplicate-keys": "3.1",
    "manifest-floats": "3.1",
    "manifest-not-canonical": "3.2",
    "manifest-trailing-space": "3.2",
    "code-point-order": "3.2",
    "feature-ignored": "3.3",
    "unknown-keys": "3.4",
    "missing-keys-default": "3.4",
    "true-is-integer": "3.4",
    "negative-integers": "3.4",
    "upper-case-digests": "3.4",
    "digest-without-algorithm": "3.4",
    "metadata-of-anything": "3.4",
    "name-any-characters": "3.5",
    "name-any-length": "3.5",
    "reserved-names": "3.5",
    "aliases-not-checked": "3.6",
    "duplicate-names": "3.6",
    "dropped-not-checked": "3.6",
    "lists-not-sorted": "3.7",
    "limits-ignored": "3.8",
    "components-unlimited": "3.8",
    "entries-unlimited": "3.8",
    "texts-unlimited": "3.8",
    "same-of-any-size": "3.8",
    "exponent-unlimited": "3.9",
    "fit-ignored": "3.9",
    "integers-convert": "3.9",
    "columns-may-differ": "3.10",
    "no-tails": "3.10",
    "base-digest-ignored": "3.11",
    "base-digest-not-sorted": "3.11",
    "asset-path-ignored": "3.12",
    "asset-path-with-newline": "3.12",
    "asset-path-by-search": "3.12",
    "asset-names-by-case": "3.12",
    "asset-index": "3.12",
    "asset-code": "3.12",
    "tensor-shapes-ignored": "4.1",
    "tensor-names-ignored": "4.1",
    "tensor-order-ignored": "4.1",
    "pads-optional": "4.2",
    "alignment-ignored": "4.2",
    # Payload.
    "module-digest-ignored": "4.3",
    "digest-without-pads": "4.3",
    "digest-of-full-only": "4.3",
    "asset-digest-ignored": "4.4",
    "pads-not-zero": "4.5",
    "unused-bits-ignored": "5.2",
    "unused-bits-of-last-row-only": "5.2",
    "infinite-scales": "5.4",
    "not-a-number-scales": "5.4",
    "negative-scales": "5.4",
    "minus-zero-scales": "5.4",
    "scales-of-first-component-only": "5.4",
    "columns-not-checked": "5.4",
    # Signs and arithmetic.
    "most-significant-bit-first": "5.1",
    "inverted-signs": "5.1",
    "bits-across-rows": "5.1",
    "transposed": "5.1",
    "row-and-col-swapped": "5.3",
    "batch-shares-col": "5.3",
    "exponent-ignored": "5.3",
    "exponent-negated": "5.3",
    "exponent-on-each-scale": "5.3",
    "product-in-f16": "5.3",
    "scale-in-f16": "5.3",
    "product-in-bf16": "5.3",
    "subnormal-scales-are-zero": "5.3",
    "flush-to-zero": "6.1",
    "truncating-cast": "6.1",
    "half-away-from-zero": "6.1",
    "terms-summed-first": "6.1",
    "components-reversed": "6.1",
    "double-precision": "6.1",
    "rounds-after-each-component": "6.1",
    "base-in-dtype-first": "6.1",
    "saturates": "6.1",
    "zero-has-no-sign": "6.1",
    "zero-scale-skipped": "6.1",
    "first-component-only": "6.1",
    "nan-payload-kept": "6.2",
    "nan-sign-kept": "6.2",
    "same-keeps-nan": "6.3",
    "same-canonical-nan": "6.3",
    "same-reinterprets": "6.3",
    "tail-from-base": "6.4",
    "tail-first": "6.4",
    "aliases-left-out": "6.5",
    "dropped-kept": "6.5",
    "base-copied": "6.5",
    # Binding.
    "no-match-is-base": "7.1",
    "partial-match": "7.1",
    "match-without-case": "7.1",
    "prefix-stripped": "7.1",
    "full-needs-no-base": "7.1",
    "base-shape-ignored": "7.2",
    "base-dtype-ignored": "7.2",
    "base-size-only": "7.2",
    "base-bytes-ignored": "7.3",
    "base-same-bytes-ignored": "7.3",
    "base-bytes-used-only": "7.3",
    # The report.
    "one-phase": "8",
    "binding-before-payload": "8",
    "content-id-of-header": "3.2",
    "output-before-checks": "8",
    "accepts-everything": "8",
    "rejects-everything": "8",
}


class Rejected(Exception):  # noqa: N818  the word of the protocol
    """The file is refused; the argument is a code of SPEC 8."""


def phase_of(code: str) -> str:
    """SPEC 8."""
    return {"1": "container", "2": "profile", "3": "payload", "4": "binding"}[code[1]]


def need(holds: object, code: str) -> None:
    if not holds:
        raise Rejected(code)


def wrapped(value: int) -> int:
    return value % 2**64


class Reader:
    """Steps 1 to 11 of SPEC 8 on one file; the result stands in the attributes."""

    def __init__(self, path: str, switch: str = "") -> None:
        self.switch = switch
        self.file = self.contents(path)
        self.records = self.container()
        self.manifest = self.profile()
        self.tensors = self.expected_tensors()
        self.payload()

    def wrong(self, name: str) -> bool:
        """Whether to make this mistake."""
        if name not in SWITCHES:
            raise KeyError(name)
        return self.switch == name

    # Steps 1 to 3.

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
            4088 <= length <= 2**24
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

    # Step 4.

    def json(self, text: str, raw: bytes, *, manifest: bool) -> Any:
        codes = ("E202",) * 4 if manifest else ("E114", "E115", "E116", "E117")
        self.depth(raw, codes[3])
        need(values(raw) <= 2**20 or self.wrong("values-unlimited"), codes[3])

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

    # Step 5.

    def header_records(self, header: dict[str, Any]) -> list[dict[str, Any]]:
        metadata = header.get("__metadata__")
        need(isinstance(metadata, dict), "E118")
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
        need(dtype in SIZES or self.wrong("dtype-unknown-is-bytes"), "E119")
        need(len(shape) <= 8 or self.wrong("nine-dimensions"), "E120")
        least = 0 if self.wrong("empty-tensors") else 1
        need(all(size >= least for size in shape), "E120")
        total = math.prod(shape) * SIZES.get(dtype, 1)
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

    # Step 6.

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

    # Step 7.

    def profile(self) -> dict[str, Any]:
        try:
            raw = self.text.encode()
        except UnicodeEncodeError:
            raise Rejected("E202") from None
        self.raw_manifest = raw
        text = self.text.strip(" ") if self.wrong("manifest-trailing-space") else self.text
        manifest = self.json(text, raw, manifest=True)
        if not (
            self.wrong("manifest-not-canonical")
            or self.wrong("manifest-duplicate-keys")
            or (self.wrong("manifest-floats") and re.search(r"\d\.\d|\de\d", text))
        ):
            try:
                need(self.canonical(manifest) == text and self.canonical(manifest).encode() is not None, "E203")
            except UnicodeEncodeError:
                raise Rejected("E203") from None
        features = manifest.get("features")
        need(isinstance(features, list) and all(isinstance(name, str) for name in features), "E205")
        need(not features or self.wrong("feature-ignored"), "E204")
        self.schema(manifest)
        self.rules(manifest)
        return manifest

    def canonical(self, value: Any) -> str:
        if isinstance(value, dict):
            order: Any = (
                None if self.wrong("code-point-order") else (lambda key: key.encode("utf-16-be", "surrogatepass"))
            )
            return (
                "{" + ",".join(f"{quoted(key)}:{self.canonical(value[key])}" for key in sorted(value, key=order)) + "}"
            )
        if isinstance(value, list):
            return "[" + ",".join(map(self.canonical, value)) + "]"
        return quoted(value) if isinstance(value, str) else json.dumps(value)

    def schema(self, manifest: dict[str, Any]) -> None:
        def hexes(value: Any) -> bool:
            return isinstance(value, str) and bool(
                HEX.fullmatch(value.lower() if self.wrong("upper-case-digests") else value)
            )

        def digest(value: Any) -> bool:
            if self.wrong("digest-without-algorithm") and isinstance(value, str):
                return hexes(value.rpartition(":")[2])
            return isinstance(value, str) and value.startswith("sha256:") and hexes(value[7:])

        def integer(value: Any) -> bool:
            return type(value) is int or (isinstance(value, bool) and self.wrong("true-is-integer"))

        def count(value: Any) -> bool:
            return integer(value) and (value >= 0 or self.wrong("negative-integers"))

        def text(value: Any) -> bool:
            return isinstance(value, str)

        def maybe(test: Any) -> Any:
            return lambda value: value is None or test(value)

        def many(test: Any) -> Any:
            return lambda value: isinstance(value, list) and all(map(test, value))

        def keyed(**tests: Any) -> Any:
            def check(value: Any) -> bool:
                if not isinstance(value, dict):
                    return False
                if set(value) - set(tests) and not self.wrong("unknown-keys"):
                    return False
                if set(tests) - set(value):
                    if not self.wrong("missing-keys-default"):
                        return False
                    value.update(
                        {
                            key: [] if key in ("assets", "tied", "dropped", "components") else None
                            for key in set(tests) - set(value)
                        }
                    )
                    return True
                return all(test(value[key]) for key, test in tests.items())

            return check

        def pair(value: Any) -> bool:
            return isinstance(value, list) and len(value) == 2 and all(map(text, value))

        def texts(value: Any) -> bool:
            return isinstance(value, dict) and (all(map(text, value.values())) or self.wrong("metadata-of-anything"))

        dtype = SIZES.__contains__
        base = keyed(dtype=lambda v: text(v) and dtype(v), sha256=hexes, shape=many(count))
        part = keyed(axis=lambda v: v in ("row", "col", "row+col", "tensor"), exponent=integer)
        module = keyed(
            base=maybe(base),
            components=many(part),
            dtype=lambda v: text(v) and dtype(v),
            encoding=lambda v: v in ("sign", "full", "same"),
            name=text,
            sha256=maybe(hexes),
            shape=many(count),
        )
        whole = keyed(
            assets=many(keyed(path=text, sha256=hexes)),
            base=keyed(digest=digest, id=text, revision=maybe(text)),
            calibration=maybe(keyed(digest=digest, samples=count, seed=count, sequence_length=count, source=text)),
            dropped=many(text),
            features=many(text),
            fine_tuned=keyed(id=text, revision=maybe(text)),
            metadata=texts,
            modules=many(module),
            producer=keyed(name=text, version=text),
            tied=many(pair),
        )
        need(whole(manifest), "E205")
        if not self.wrong("lists-not-sorted"):
            aliases = [alias for _, alias in manifest["tied"]]
            need(aliases == sorted(aliases), "E205")
            need(manifest["dropped"] == sorted(set(manifest["dropped"])), "E205")

    # Step 8.

    def rules(self, manifest: dict[str, Any]) -> None:
        modules = manifest["modules"]
        names = [module["name"] for module in modules]
        aliases = [alias for _, alias in manifest["tied"]]
        for name in names + [name for pair in manifest["tied"] for name in pair] + manifest["dropped"]:
            plain = name.lstrip("_") or name if self.wrong("reserved-names") else name
            fits = (
                NAME.fullmatch(plain)
                or (self.wrong("name-any-characters") and 1 <= len(name) <= 512)
                or (self.wrong("name-any-length") and NAME.fullmatch(name[:512] or "x"))
            )
            need(fits, "E206")
        known = set(names)
        need(len(known) == len(names) or self.wrong("duplicate-names"), "E207")
        if not self.wrong("aliases-not-checked"):
            need(len(set(aliases)) == len(aliases) and not known & set(aliases), "E207")
            need(all(first in known for first, _ in manifest["tied"]), "E207")
        need(not set(manifest["dropped"]) & (known | set(aliases)) or self.wrong("dropped-not-checked"), "E207")
        need(1 <= len(modules) <= 65536 or self.wrong("limits-ignored"), "E208")
        for key in ("assets", "dropped", "metadata", "tied"):
            need(len(manifest[key]) <= 65536 or self.wrong("entries-unlimited"), "E208")
        for key in ("base", "calibration", "features", "fine_tuned", "metadata", "producer"):
            size = len(self.canonical(manifest[key]).encode("utf-8", "replace"))
            need(size <= 2 ** (22 if key == "metadata" else 16) or self.wrong("texts-unlimited"), "E208")
        for module in modules:
            self.module_rules(module)
        bound = [[m["name"], m["base"]["dtype"], m["base"]["shape"], m["base"]["sha256"]] for m in modules if m["base"]]
        if not self.wrong("base-digest-not-sorted"):
            bound.sort(key=lambda row: row[0])
        digest = "sha256:" + hashlib.sha256(self.canonical(bound).encode("utf-8", "replace")).hexdigest()
        need(
            manifest["base"]["digest"].lower() == digest
            or self.wrong("base-digest-ignored")
            or self.wrong("digest-without-algorithm"),
            "E210",
        )
        self.asset_rules([asset["path"] for asset in manifest["assets"]])

    def module_rules(self, module: dict[str, Any]) -> None:
        shape, base, parts = module["shape"], module["base"], module["components"]
        for held in (module, base) if base else (module,):
            sizes = held["shape"]
            need((len(sizes) <= 8 and all(size >= 1 for size in sizes)) or self.wrong("limits-ignored"), "E208")
            need(math.prod(sizes) * SIZES.get(held["dtype"], 1) < 2**53 or self.wrong("same-of-any-size"), "E208")
        need(len(parts) <= 8 or self.wrong("components-unlimited"), "E208")
        need(all(-64 <= part["exponent"] <= 63 for part in parts) or self.wrong("exponent-unlimited"), "E209")
        encoding, floats = module["encoding"], module["dtype"] in FLOATS
        if self.wrong("fit-ignored") and (encoding == "full" or base):
            return
        if encoding == "full":
            need(not parts and module["sha256"], "E209")
            return
        need(base, "E209")
        base_floats = base["dtype"] in FLOATS
        need(self.rows_fit(shape, base["shape"]), "E209")
        if encoding == "sign":
            need(parts and module["sha256"] and floats and base_floats and len(shape) >= 2, "E209")
        else:
            converts = (floats and base_floats) or (
                self.wrong("integers-convert") and SIZES[module["dtype"]] == SIZES[base["dtype"]]
            )
            need(not parts and (module["dtype"] == base["dtype"] or converts), "E209")
            need((module["sha256"] is not None) == bool(self.tail(module)), "E209")

    def rows_fit(self, shape: list[int], base: list[int]) -> bool:
        if self.wrong("no-tails"):
            return shape == base
        if self.wrong("columns-may-differ"):
            return len(shape) == len(base)
        return len(shape) == len(base) and shape[1:] == base[1:]

    def asset_rules(self, paths: list[str]) -> None:
        if self.wrong("asset-path-ignored"):
            return
        pattern = ASSET.replace("|md", "|md|py|bin") if self.wrong("asset-code") else ASSET
        for path in paths:
            if self.wrong("asset-path-by-search"):
                fits = re.search(pattern, path)
            elif self.wrong("asset-path-with-newline"):
                fits = re.match(f"^{pattern}$", path)
            else:
                fits = re.fullmatch(pattern, path)
            need(fits, "E211")
            need(not path.endswith(".index.json") or self.wrong("asset-index"), "E211")
        folded = paths if self.wrong("asset-names-by-case") else [path.lower() for path in paths]
        need(len(set(folded)) == len(folded), "E211")

    @staticmethod
    def covered(module: dict[str, Any]) -> list[int]:
        """[kept, *shape[1:]]."""
        shape = module["shape"]
        if module["encoding"] == "full" or not shape:
            return list(shape)
        return [min(shape[0], module["base"]["shape"][0]), *shape[1:]]

    def tail(self, module: dict[str, Any]) -> list[int]:
        """The tail's shape; empty where there is none."""
        shape = module["shape"]
        rest = shape[0] - self.covered(module)[0] if shape else 0
        return [rest, *shape[1:]] if rest else []

    def module_tensors(self, module: dict[str, Any]) -> list[tuple[str, str, list[int]]]:
        name, covered, made = module["name"], self.covered(module), []
        for k, part in enumerate(module["components"]):
            *batch, out, width = covered
            made.append((f"{name}.{k}.mask", "U8", [*batch, out, -(-width // 8)]))
            if part["axis"] in ("row", "row+col"):
                made.append((f"{name}.{k}.row", "F16", [*batch, out]))
            if part["axis"] in ("col", "row+col"):
                made.append((f"{name}.{k}.col", "F16", [*batch, width]))
            if part["axis"] == "tensor":
                made.append((f"{name}.{k}.scalar", "F16", [1]))
        if module["encoding"] == "full":
            made.append((f"{name}.full", module["dtype"], module["shape"]))
        elif self.tail(module):
            made.append((f"{name}.tail", module["dtype"], self.tail(module)))
        return made

    def expected_tensors(self) -> dict[str, tuple[int, int]]:
        """name -> [begin, end) in the data, for every tensor but pads."""
        wanted = [entry for module in self.manifest["modules"] for entry in self.module_tensors(module)]
        plain = [record for record in self.records if not record["name"].startswith("__pad__.")]
        sizes = [record["shape"] for record in plain if record["name"].startswith("__asset__.")]
        self.pads = [record for record in self.records if record["name"].startswith("__pad__.")]
        wanted += [
            (f"__asset__.{i}", "U8", sizes[i] if i < len(sizes) and len(sizes[i]) == 1 else [1])
            for i in range(len(self.manifest["assets"]))
        ]
        need(len(wanted) == len(plain), "E212")
        if self.wrong("tensor-order-ignored"):
            by_name = {record["name"]: record for record in plain}
            need(all(name in by_name for name, _, _ in wanted), "E212")
            plain = [by_name[name] for name, _, _ in wanted]
        for record, (name, dtype, shape) in zip(plain, wanted, strict=True):
            need(record["name"] == name or self.wrong("tensor-names-ignored"), "E212")
            if self.wrong("tensor-shapes-ignored"):
                continue
            need((record["dtype"], record["shape"]) == (dtype, shape), "E212")
        if not (self.wrong("pads-optional") or self.wrong("alignment-ignored")):
            self.pads_fit(plain)
        return {name: tuple(record["data_offsets"]) for record, (name, _, _) in zip(plain, wanted, strict=True)}  # type: ignore[misc]

    def pads_fit(self, plain: list[dict[str, Any]]) -> None:
        made: list[tuple[str, list[int]]] = []
        end = pads = 0
        for record in plain:
            if gap := -end % 64:
                made.append((f"__pad__.{pads}", [gap]))
                pads += 1
                end += gap
            made.append((record["name"], record["shape"]))
            end += record["data_offsets"][1] - record["data_offsets"][0]
        have = [(record["name"], record["shape"]) for record in self.records]
        if not self.wrong("tensor-order-ignored"):
            need(have == made, "E212")
        need(all(record["dtype"] == "U8" for record in self.pads), "E212")

    # Steps 9 to 11.

    def bytes_of(self, name: str) -> bytes:
        begin, end = self.tensors[name]
        return self.file[self.start + begin : self.start + end]

    def payload(self) -> None:
        for module in self.manifest["modules"]:
            self.module_digest(module)
        for i, asset in enumerate(self.manifest["assets"]):
            right = hashlib.sha256(self.bytes_of(f"__asset__.{i}")).hexdigest() == asset["sha256"].lower()
            need(right or self.wrong("asset-digest-ignored"), "E302")
        for pad in self.pads:
            begin, end = pad["data_offsets"]
            need(not any(self.file[self.start + begin : self.start + end]) or self.wrong("pads-not-zero"), "E304")
        for module in self.manifest["modules"]:
            for k, part in enumerate(module["components"]):
                self.unused_bits(module, k)
                self.finite_scales(module["name"], k, part["axis"])

    def module_digest(self, module: dict[str, Any]) -> None:
        names = [name for name, _, _ in self.module_tensors(module)]
        if (
            not names
            or self.wrong("module-digest-ignored")
            or (self.wrong("digest-of-full-only") and module["encoding"] != "full")
        ):
            return
        data = self.file[self.start + self.tensors[names[0]][0] : self.start + self.tensors[names[-1]][1]]
        if self.wrong("digest-without-pads"):
            data = b"".join(map(self.bytes_of, names))
        need(hashlib.sha256(data).hexdigest() == (module["sha256"] or "").lower(), "E301")

    def unused_bits(self, module: dict[str, Any], k: int) -> None:
        width = self.covered(module)[-1]
        mask, stride = self.bytes_of(f"{module['name']}.{k}.mask"), -(-width // 8)
        if width % 8 and not self.wrong("unused-bits-ignored"):
            last = mask[-1:] if self.wrong("unused-bits-of-last-row-only") else mask[stride - 1 :: stride]
            need(all(byte >> width % 8 == 0 for byte in last), "E303")

    def finite_scales(self, name: str, k: int, axis: str) -> None:
        if k and self.wrong("scales-of-first-component-only"):
            return
        words = {"row+col": ["row", "col"], "tensor": ["scalar"]}.get(axis, [axis])
        for word in words:
            if word == "col" and self.wrong("columns-not-checked"):
                continue
            raw = self.bytes_of(f"{name}.{k}.{word}")
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


def values(raw: bytes) -> int:
    """SPEC 2.11: elements and members of every array and object of a text."""
    marks = re.finditer(rb'"(?:[^"\\]++|\\.)*+"?|,|[\[{](?![ \t\r\n]*+[\]}])', raw, re.DOTALL)
    return sum(raw[mark.start()] != 0x22 for mark in marks)


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


ESCAPES = {8: "\\b", 9: "\\t", 10: "\\n", 12: "\\f", 13: "\\r", 0x22: '\\"', 0x5C: "\\\\"}
SPECIAL = re.compile(r'[\x00-\x1f"\\]')


def quoted(text: str) -> str:
    return '"' + SPECIAL.sub(lambda m: ESCAPES.get(ord(m[0])) or f"\\u{ord(m[0]):04x}", text) + '"'
