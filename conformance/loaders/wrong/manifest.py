"""Step 7 of SPEC 8: the manifest's canonical form, features and schema."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

from common import BITS, Rejected, need, quoted
from container import Container

__all__ = ["Manifest"]

HEX = re.compile(r"[0-9a-f]{64}")


class Manifest(Container):
    """Reads the manifest."""

    def profile(self) -> dict[str, Any]:
        try:
            raw = self.text.encode()
        except UnicodeEncodeError:
            raise Rejected("E202") from None
        self.raw_manifest = raw
        text = self.text.strip(" ") if self.wrong("manifest-trailing-space") else self.text
        manifest: dict[str, Any] = self.json(text, raw, manifest=True)
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
        need(features in ([], ["exact"]) or self.wrong("feature-ignored"), "E204")
        self.chained = features == ["exact"]
        self.schema(manifest)
        manifest["modules"] = [self.spelled_out(module) for module in manifest["modules"]]
        self.give_digests(manifest["modules"], self.table(manifest["digests"]))
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

        def dtype(value: Any) -> bool:
            return text(value) and value in BITS

        def part(value: Any) -> bool:
            axes = ("row", "col", "row+col", "tensor")
            return isinstance(value, list) and len(value) == 2 and value[0] in axes and integer(value[1])

        optional = {
            "base": maybe(keyed(dtype=dtype, shape=many(count))),
            "components": many(part),
            "dtype": dtype,
            "encoding": lambda v: (
                v in ("full", "same", "exact") or (v == "sign" and self.wrong("defaults-written-out"))
            ),
            "size": count,
        }

        def module(value: Any) -> bool:
            if not isinstance(value, dict):
                return False
            # The checks of omitted values need not run.
            held = {key: test for key, test in optional.items() if key in value}
            one = ("components" in value) != ("encoding" in value) or self.wrong("defaults-written-out")
            sized = ("size" in value) == (value.get("encoding") == "exact") or self.wrong("size-beside-anything")
            return one and sized and keyed(**held, name=text, shape=many(count))(value)

        chain = {"previous": maybe(digest), "result": maybe(digest)} if self.chained else {}
        whole = keyed(
            **chain,
            assets=many(keyed(path=text, sha256=hexes)),
            base=keyed(digest=digest, id=text, revision=maybe(text)),
            calibration=maybe(keyed(digest=digest, samples=count, seed=count, sequence_length=count, source=text)),
            digests=text,
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

    def spelled_out(self, module: dict[str, Any]) -> dict[str, Any]:
        """SPEC 3.4: a module with its usual values."""
        lenient = self.wrong("defaults-written-out")
        need(module.get("dtype") != "BF16" or lenient, "E205")
        dtype, shape = module.get("dtype", "BF16"), module.get("shape")
        like = {"dtype": dtype, "shape": shape}
        need(module.get("base") != like or lenient, "E205")
        base = module.get("base", like)
        return {
            "name": module.get("name"),
            "dtype": dtype,
            "shape": shape,
            "encoding": module.get("encoding", "sign"),
            "size": module.get("size", 0),
            "components": [{"axis": axis, "exponent": exponent} for axis, exponent in module.get("components", [])],
            "base": dict(base) if base else None,
        }

    def table(self, written: str) -> list[str]:
        """SPEC 3.4: the hex digests of the table."""
        if self.wrong("digests-any-base64"):
            written = re.sub(r"[^A-Za-z0-9+/]", "", written)
        need(re.fullmatch(r"[A-Za-z0-9+/]*", written) and len(written) % 4 != 1, "E205")
        raw = base64.b64decode(written + "=" * (-len(written) % 4))
        need(len(raw) % 32 == 0 or self.wrong("digests-any-base64"), "E205")
        exact = base64.b64encode(raw).decode().rstrip("=") == written
        need(exact or self.wrong("digests-any-base64") or self.wrong("digests-unused-bits"), "E205")
        return [raw[i : i + 32].hex() for i in range(0, len(raw) - 31, 32)]

    def give_digests(self, modules: list[dict[str, Any]], digests: list[str]) -> None:
        """SPEC 3.13: of each base tensor, then of each tensor of the file."""
        held = iter(digests)

        def take() -> str:
            found = next(held, None)
            need(found is not None or self.wrong("digests-not-counted"), "E213")
            return found or "0" * 64

        for module in modules:
            base, shape = module["base"], module["shape"]
            grown = bool(base and shape and base["shape"] and shape[0] > base["shape"][0])
            stored = module["encoding"] != "same" or grown
            own = take() if stored and self.wrong("digests-own-first") else None
            if base:
                base["sha256"] = take()
            module["sha256"] = own or (take() if stored else None)
            module["result"] = take() if module["encoding"] == "exact" else None
        need(next(held, None) is None or self.wrong("digests-not-counted"), "E213")

    def rules(self, manifest: dict[str, Any]) -> None:
        """Step 8, in rules.py."""
        raise NotImplementedError
