"""The field `digests` of a manifest: SHA-256 values of all modules, one after another, in base64 (SPEC 3.13)."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from typing import Final

from peraxis_format.errors import fail

__all__ = ["DigestReader", "written"]

_SIZE: Final = 32
_BASE64: Final = re.compile(rb"[A-Za-z0-9+/]*+")


def written(digests: Iterable[str | None]) -> str:
    """The text of the field: hex digests (None: no digest) to base64 without padding."""
    raw = bytes.fromhex("".join(digest for digest in digests if digest is not None))
    return base64.b64encode(raw).decode().rstrip("=")


class DigestReader:
    """Returns the digests in order. text: that of the field, without quotation marks. Raises ProfileError (E205)."""

    def __init__(self, text: bytes) -> None:
        self._at = 0
        self._raw = base64.b64decode(text + b"=" * (-len(text) % 4)) if _fits(text) else b""
        if len(self._raw) % _SIZE or base64.b64encode(self._raw).rstrip(b"=") != text:
            fail("E205", "not base64 of whole SHA-256 values", field="digests")  # SPEC 3.4

    def take(self) -> str:
        """The next digest, as 64 hex digits."""
        digest = self._raw[self._at : self._at + _SIZE]
        self._at += _SIZE
        return digest.hex()

    def finish(self) -> None:
        """Check that all digests were taken. Raises ProfileError (E213)."""
        if self._at != len(self._raw):
            detail = f"{len(self._raw) // _SIZE} digests, {self._at // _SIZE} asked for"
            fail("E213", detail, field="digests")  # SPEC 3.13


def _fits(text: bytes) -> bool:
    return len(text) % 4 != 1 and _BASE64.fullmatch(text) is not None
