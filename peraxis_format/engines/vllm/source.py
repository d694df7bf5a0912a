"""Open a delta by the operator's name: a path, hf://org/repo/file.pxd, org/repo, or an http(s) URL.

Every rank opens it separately. A URL is fetched into a temporary folder of the process, which is removed with the
process; the hub's cache is used for the hub (peraxis_format.hub).
"""

from __future__ import annotations

import atexit
import errno
import shutil
import tempfile
import urllib.request
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.error import HTTPError
from urllib.parse import urlsplit

from peraxis_format.engines.vllm.bridge import agree
from peraxis_format.errors import CheckpointError, LiveModelError
from peraxis_format.hub import hub_path
from peraxis_format.reader import DeltaFile

__all__ = ["local_path", "open_delta"]

_SILENCE_SECONDS: Final = 60.0


def local_path(source: str) -> Path:
    """The local path of a delta. Raises CheckpointError, OSError."""
    if source.startswith(("http://", "https://")):
        return _download(source)
    return hub_path(source)


def open_delta(source: str, *, group: Any = None) -> DeltaFile:
    """Open a delta on every rank of a group; all open the same file, or all raise.

    Raises CheckpointError, PxdError, OSError; LiveModelError if ranks find different files under one name.
    """
    file: DeltaFile | None = None
    failure: BaseException | None = None
    try:
        file = DeltaFile(local_path(source))
    except Exception as error:
        failure = error
    try:
        _agree(failure, group)
        assert file is not None
        _refuse_different(source, file, group)
    except BaseException:
        if file is not None:
            file.close()
        raise
    return file


def _agree(failure: BaseException | None, group: Any) -> None:
    if group is None and failure is not None:
        raise failure
    if group is not None:
        agree(failure, group)


def _refuse_different(source: str, file: DeltaFile, group: Any) -> None:
    if group is None:
        return
    import torch.distributed as distributed

    found: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(found, file.content_id, group=group)
    if len(set(found)) > 1:
        raise LiveModelError(f"{source}: is another file on another rank; give every host the same file")


@cache
def _download(url: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="peraxis-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = folder / (PurePosixPath(urlsplit(url).path).name or "delta.pxd")
    shown = url.partition("?")[0]
    try:
        with urllib.request.urlopen(url, timeout=_SILENCE_SECONDS) as reader, open(target, "wb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, HTTPError):
            error.close()
        advice = f"make room in {folder.parent}" if error.errno == errno.ENOSPC else "check the address"
        raise CheckpointError(f"{shown}: cannot be fetched ({error}); {advice}") from None
    return target
