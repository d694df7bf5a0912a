"""The verb extract: write the small files of a delta without a base: configuration, tokenizer, chat templates."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import peraxis_format as pxd
from peraxis_format.urls import is_url
from peraxis_tools.arguments import check_paths
from peraxis_tools.errors import CheckFailedError, ToolError
from peraxis_tools.outputs.folders import atomic_folder
from peraxis_tools.outputs.rules import claim_folder
from peraxis_tools.remote.files import RemoteFile

__all__ = ["ExtractResult", "extract"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractResult:
    """The result of `extract`. path: the folder. files: paths in it. bytes: their total size."""

    path: Path
    content_id: str
    files: tuple[str, ...]
    bytes: int


def extract(delta: str | Path, output: str | Path, *, overwrite: bool = False) -> ExtractResult:
    """Write the assets of a delta (SPEC 3.12) to a folder and check the digest of each.

    delta: a file or a URL. From a URL only the header and the assets are fetched. Raises PxdError, ToolError, OSError.
    """
    check_paths(delta=delta, output=output)
    output = Path(output)
    with claim_folder(output, overwrite=overwrite, inputs=(delta,)), _opened(delta) as (content_id, paths, read):
        if not paths:
            raise ToolError(f"{delta}: has no assets, so there is nothing to extract")
        with atomic_folder(output, overwrite=overwrite) as folder:
            size = 0
            for path in paths:
                data = read(path)
                size += len(data)
                (folder / path).parent.mkdir(exist_ok=True)
                (folder / path).write_bytes(data)
    return ExtractResult(path=output, content_id=content_id, files=tuple(sorted(paths)), bytes=size)


@contextlib.contextmanager
def _opened(source: str | Path) -> Iterator[tuple[str, list[str], Callable[[str], bytes]]]:
    """Content ID, asset paths, and a function that reads one of them."""
    if is_url(source):
        yield _remote(str(source))
        return
    with pxd.open(source) as file:
        yield file.content_id, [asset.path for asset in file.manifest.assets], file.asset


def _remote(url: str) -> tuple[str, list[str], Callable[[str], bytes]]:
    remote = RemoteFile(url)
    header, manifest = remote.header()
    spans = {record.name: (record.begin, record.end) for record in header.records}
    places = {asset.path: (i, asset.sha256) for i, asset in enumerate(manifest.assets)}

    def read(path: str) -> bytes:
        i, digest = places[path]
        begin, end = spans[f"__asset__.{i}"]
        data = remote.read(header.size + begin, end - begin)
        if hashlib.sha256(data).hexdigest() != digest:
            raise CheckFailedError(f"{url}: {path} does not match its digest (SPEC 4.4); fetch it again")
        return data

    return manifest.content_id, list(places), read
