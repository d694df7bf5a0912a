"""URLs for display: without user, password, and keys or signatures in the query (a user name may be a token); and those
of local files.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from peraxis_format.urls import is_url

__all__ = ["file_of", "local_path", "without_secrets"]

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


def local_path(source: str | Path) -> Path | None:
    """The path of a name on this machine, which may be a file:// URL; None for any other URL."""
    return file_of(source) or (None if is_url(source) else Path(source))


def without_secrets(text: str) -> str:
    """The text with all users, passwords, keys and signatures of URLs replaced by `***`."""
    if "://" not in text:
        return text
    return _SECRET.sub(r"\g<before>***", _USER.sub(r"\g<before>***@", text))
