"""Which names are URLs, and the patience with the servers that they name."""

from __future__ import annotations

import os
import re
from typing import Any, Final

__all__ = ["SILENCE_SECONDS", "http_options", "is_http", "is_url"]

SILENCE_SECONDS: Final = 60.0  # that an HTTP server may send nothing
# Two letters at least, because C:// is a drive. fsspec chains file systems: simplecache::s3://bucket/delta.pxd.
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::[A-Za-z][A-Za-z0-9+.-]+)*://")


def is_url(source: str | os.PathLike[str]) -> bool:
    """Whether this is a URL, not a path. A Path never is one."""
    return isinstance(source, str) and _URL.match(source) is not None


def is_http(source: str) -> bool:
    """Whether this is a URL of HTTP."""
    return source.startswith(("http://", "https://"))


def http_options(url: str, *, silence: float = SILENCE_SECONDS) -> dict[str, Any]:
    """The options of fsspec's file system for a URL. silence: the seconds that a server may send nothing.

    A slow server is allowed as long as it sends data, which must not be packed. Only HTTP is configured; the libraries
    of the hub and of object stores have such limits themselves.
    """
    if not is_http(url):
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=silence, sock_read=silence)
    headers = {"Accept-Encoding": "identity"}
    return {"client_kwargs": {"timeout": timeout, "headers": headers, "auto_decompress": False}}
