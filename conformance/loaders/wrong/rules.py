"""Step 8 of SPEC 8: names, limits, encodings, base digest, assets, tensors."""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any

from common import BITS, FLOATS, need
from manifest import Manifest

__all__ = ["Rules"]

NAME = re.compile(r"(?!__)[!-.0-\[\]-~]{1,512}")
ASSET = r"([A-Za-z0-9_][A-Za-z0-9_-]{0,62}/)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,118}\.(json|txt|model|jinja|tiktoken|md)"


class Rules(Manifest):
    """Checks the manifest by SPEC 3.5 to 4.2."""

    manifest: dict[str, Any]
    records: list[dict[str, Any]]

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
        need(1 <= len(modules) <= 2**18 or self.wrong("limits-ignored"), "E208")
        for key in ("assets", "dropped", "metadata", "tied"):
            need(len(manifest[key]) <= 2**18 or self.wrong("entries-unlimited"), "E208")
        for key in ("base", "calibration", "features", "fine_tuned", "metadata", "producer"):
            size = len(self.canonical(manifest[key]).encode("utf-8", "replace"))
            need(size <= 2 ** (24 if key == "metadata" else 16) or self.wrong("texts-unlimited"), "E208")
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
        if self.chained and not self.wrong("result-ignored"):
            need(manifest["result"] == self.result(modules), "E214")
        self.asset_rules([asset["path"] for asset in manifest["assets"]])

    def result(self, modules: list[dict[str, Any]]) -> str | None:
        """SPEC 3.14."""
        made = []
        for m in modules:
            base, known = m["base"], {"full": m["sha256"], "exact": m["result"]}.get(m["encoding"])
            like = base and (base["dtype"], base["shape"]) == (m["dtype"], m["shape"])
            if m["encoding"] == "same" and (like or self.wrong("result-of-any-same")):
                known = base["sha256"]
            if known is None:
                return None
            made.append([m["name"], m["dtype"], m["shape"], known])
        if not self.wrong("result-not-sorted"):
            made.sort(key=lambda row: row[0])
        return "sha256:" + hashlib.sha256(self.canonical(made).encode("utf-8", "replace")).hexdigest()

    def module_rules(self, module: dict[str, Any]) -> None:
        shape, base, parts = module["shape"], module["base"], module["components"]
        for held in (module, base) if base else (module,):
            sizes = held["shape"]
            need((len(sizes) <= 8 and all(size >= 1 for size in sizes)) or self.wrong("limits-ignored"), "E208")
            total = self.size(held["dtype"], sizes)
            need(total is not None or self.wrong("same-of-half-bytes"), "E208")
            need((total or 0) < 2**53 or self.wrong("same-of-any-size"), "E208")
        need(len(parts) <= 8 or self.wrong("components-unlimited"), "E208")
        need(all(-64 <= part["exponent"] <= 63 for part in parts) or self.wrong("exponent-unlimited"), "E209")
        encoding, floats = module["encoding"], module["dtype"] in FLOATS
        if self.wrong("fit-ignored") and (encoding == "full" or base):
            return
        if encoding == "full":
            return
        need(base, "E209")
        base_floats = base["dtype"] in FLOATS
        need(self.rows_fit(shape, base["shape"]), "E209")
        if encoding == "sign":
            need(parts and floats and base_floats and len(shape) >= 2, "E209")
        elif encoding == "exact":
            typed = module["dtype"] == base["dtype"] or self.wrong("exact-on-any-float")
            need(floats and base_floats and typed, "E209")
            need(self.chained or self.wrong("exact-without-feature"), "E209")
            need(module["size"] >= 1 or self.wrong("exact-of-nothing"), "E209")
        else:
            converts = (floats and base_floats) or (
                self.wrong("integers-convert") and BITS[module["dtype"]] == BITS[base["dtype"]]
            )
            need(module["dtype"] == base["dtype"] or converts, "E209")

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
        """The tail's shape; empty if there is none."""
        shape = module["shape"]
        rest = shape[0] - self.covered(module)[0] if shape else 0
        return [rest, *shape[1:]] if rest else []

    def parts(self, module: dict[str, Any]) -> list[tuple[str, int, int]]:
        """Suffix, begin and end of each part of a module's delta (SPEC 4.2)."""
        covered, sizes = self.covered(module), []
        for k, part in enumerate(module["components"]):
            *batch, out, width = covered
            rows = math.prod([*batch, out])
            sizes.append((f"{k}.mask", rows * -(-width // 8)))
            if part["axis"] in ("row", "row+col"):
                sizes.append((f"{k}.row", 2 * rows))
            if part["axis"] in ("col", "row+col"):
                sizes.append((f"{k}.col", 2 * math.prod([*batch, width])))
            if part["axis"] == "tensor":
                sizes.append((f"{k}.scalar", 2))
        if module["encoding"] == "exact":
            sizes += [("index", 4 * -(-math.prod(covered) // 65_536)), ("data", module["size"])]
        if module["encoding"] != "full" and self.tail(module):
            sizes.append(("tail", math.prod(self.tail(module)) * BITS[module["dtype"]] // 8))
        made, end = [], 0
        step = 16 if self.wrong("parts-at-16") else 64
        for suffix, size in sizes:
            begin = -(-end // step) * step
            end = begin + size
            made.append((suffix, begin, end))
        return made

    def module_tensor(self, module: dict[str, Any]) -> list[tuple[str, str, list[int]]]:
        """SPEC 4.1: name, dtype and shape of the module's tensor, or nothing."""
        name = module["name"]
        if module["encoding"] == "full":
            return [(f"{name}.full", module["dtype"], module["shape"])]
        parts = self.parts(module)
        return [(f"{name}.delta", "U8", [-(-parts[-1][2] // 64) * 64])] if parts else []

    def expected_tensors(self) -> dict[str, tuple[int, int]]:
        """name -> [begin, end) in the data, for every tensor but pads."""
        wanted = [entry for module in self.manifest["modules"] for entry in self.module_tensor(module)]
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
        return {name: tuple(record["data_offsets"]) for record, (name, _, _) in zip(plain, wanted, strict=True)}

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
