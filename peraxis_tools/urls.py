"""URLs for display: without user, password, and keys or signatures in the query. A user name may be a token."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["without_secrets"]

_USER: Final = re.compile(r"(?P<before>[A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#]*@")
_SECRET: Final = re.compile(
    r"(?P<before>[?&][^\s?&=#]*(?:sig|token|key|secret|password|passwd|credential|auth)[^\s?&=#]*=)"
    r"[^\s&#'\"]*[^\s&#'\",:;.)]",
    re.IGNORECASE,
)


def without_secrets(text: str) -> str:
    """The text with all users, passwords, keys and signatures of URLs replaced by `***`."""
    if "://" not in text:
        return text
    return _SECRET.sub(r"\g<before>***", _USER.sub(r"\g<before>***@", text))
