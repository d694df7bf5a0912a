"""URLs for display: without user, password, and keys or signatures in the query (a user name may be a token); and those
of local files.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

__all__ = ["file_of", "without_secrets"]

_LOCAL: Final = ("file://", "local://")  # of fsspec
_USER: Final = re.compile(r"(?P<before>[A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#]*@")
_SECRET: Final = re.compile(
    r"(?P<before>[?&][^\s?&=#]*(?:sig|token|key|secret|password|passwd|credential|auth)[^\s?&=#]*=)"
    r"[^\s&#'\"]*[^\s&#'\",:;.)]",
    re.IGNORECASE,
)


def file_of(source: str | Path) -> Path | None:
    """The path that a file:// URL names; None for everything else."""
    for scheme in _LOCAL:
        if isinstance(source, str) and source.startswith(scheme):
            return Path(source.removeprefix(scheme))
    return None


def without_secrets(text: str) -> str:
    """The text with all users, passwords, keys and signatures of URLs replaced by `***`."""
    if "://" not in text:
        return text
    return _SECRET.sub(r"\g<before>***", _USER.sub(r"\g<before>***@", text))
