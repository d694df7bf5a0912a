"""The verb inspect: the content of a PXD file and the use of its bytes, from a path or a URL."""

from __future__ import annotations

import hashlib

from peraxis_tools.deltas.inspection import InspectResult, inspect, summarise

__all__ = ["InspectResult", "inspect", "inspect_remote"]


def inspect_remote(url: str) -> InspectResult:
    """`inspect` of a URL: only the header is read, by range requests. Raises ToolError, PxdError."""
    from peraxis_tools.remote.files import RemoteFile

    remote = RemoteFile(url)
    header, manifest = remote.header()
    content_id = "sha256:" + hashlib.sha256(header.manifest).hexdigest()
    return summarise(remote.url, content_id, remote.size, manifest, header.records)
