"""Step 7 of SPEC 8: the manifest's canonical form, features and schema."""

from __future__ import annotations

import json
import re
from typing import Any

from common import SIZES, Rejected, need, quoted
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

    def rules(self, manifest: dict[str, Any]) -> None:
        """Step 8, in rules.py."""
        raise NotImplementedError
