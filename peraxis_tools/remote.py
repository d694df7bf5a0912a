"""Files by URL: any URL of fsspec (https, s3, gs, file, ...) and hf://org/repo/file.pxd, with @revision.

A header is read by range requests. Verbs that need the payload fetch the file once into a temporary folder. Fetched
bytes are not trusted: the same checks follow as for a local file.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Final

import peraxis_format as pxd
from peraxis_format.hub import hub_file, hub_name
from peraxis_tools.errors import ToolError, first_line
from peraxis_tools.folders import scratch_folder
from peraxis_tools.optional import missing, require
from peraxis_tools.progress import ProgressOf, silent
from peraxis_tools.urls import without_secrets

__all__ = ["SILENCE_SECONDS", "RemoteFile", "is_remote", "local_copy", "remote_file"]

SILENCE_SECONDS: Final = 60.0
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::[A-Za-z][A-Za-z0-9+.-]+)*://")
_START: Final = 1 << 16  # cached bytes of a file's beginning, at most
# Users write hf://org/repo/path@revision; the hub's file system needs hf://org/repo@revision/path.
_HUB: Final = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)/(?P<path>[^@]+)@(?P<revision>[^@]+)")


def is_remote(source: str | Path) -> bool:
    """Whether this is a URL, not a path."""
    return isinstance(source, str) and _URL.match(source) is not None


def _hub_form(url: str) -> str:
    match = _HUB.fullmatch(url)
    if match is None:
        return url
    revision = match["revision"].replace("/", "%2F")
    return f"hf://{match['repo']}@{revision}/{match['path']}"


class RemoteFile:
    """One remote file: its size and ranges of its bytes. requested counts the requested bytes."""

    def __init__(self, url: str) -> None:
        self.url = without_secrets(url)
        self.requested = 0
        self._start = b""
        require(self.url, "fsspec")
        with _readable(url):
            import fsspec

            self._system, self._path = fsspec.core.url_to_fs(_hub_form(url), **_patience(url))
            size = self._system.size(self._path)
        if size is None:
            raise ToolError(f"{self.url}: the server does not say how large the file is; download it first")
        self.size = int(size)

    def read(self, offset: int, size: int) -> bytes:
        """Read bytes from offset, fewer at the end of the file. Raises ToolError if the server sends another number."""
        end = min(offset + size, self.size)
        if end <= offset:
            return b""
        if offset == 0 and size <= _START:
            self._start = self._fetch(0, end)
            return self._start
        # The first bytes of the header have been fetched to find its length.
        held = self._start[offset:end]
        return held + self._fetch(offset + len(held), end) if len(held) < end - offset else held

    def _fetch(self, offset: int, end: int) -> bytes:
        with _readable(self.url):
            data: bytes = self._system.cat_file(self._path, start=offset, end=end)
        self.requested += len(data)
        if len(data) != end - offset:
            raise ToolError(f"{self.url}: the server sent {len(data)} bytes for a range of {end - offset}; download it")
        return data

    def header(self) -> tuple[pxd.Header, pxd.Manifest]:
        """Read and check the header alone (steps 1 to 8 of SPEC 8). Raises ContainerError, ProfileError."""
        try:
            return pxd.read_header(self.read, self.size)
        except pxd.PxdError as error:
            error.file = self.url
            raise

    def download(self, target: Path, *, progress: Callable[[int], None] | None = None) -> None:
        """Write the whole file to target in blocks; each byte is requested once."""
        with _readable(self.url):
            from fsspec.callbacks import Callback

            class Steps(Callback):  # type: ignore[misc, unused-ignore]
                """Passes numbers of bytes to `progress`."""

                def relative_update(self, inc: int = 1) -> None:
                    if progress is not None:
                        progress(inc)

            self._system.get_file(self._path, str(target), callback=Steps())


def _patience(url: str) -> dict[str, Any]:
    """Options of a URL's file system: a slow server is allowed as long as it sends data.

    Only http is configured; the libraries of the hub and of object stores have such limits themselves.
    """
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
    return {"client_kwargs": {"timeout": timeout}}


@contextlib.contextmanager
def _readable(url: str) -> Iterator[None]:
    """Turn all errors of a file system library into a ToolError of one line."""
    shown = without_secrets(url)
    try:
        yield
    except (ToolError, pxd.PxdError):
        raise
    except ImportError as error:
        raise missing(shown, error) from None
    except ValueError as error:
        raise ToolError(f"{shown}: {without_secrets(first_line(error))}") from None
    except Exception as error:  # aiohttp, botocore, huggingface_hub: each has its own hierarchy
        if _is_timeout(error):
            silence = f"the server sent nothing for {SILENCE_SECONDS:g} s; try again later"
            raise ToolError(f"{shown}: {silence}") from None
        reason = f"{type(error).__name__}: {without_secrets(first_line(error))}"
        raise ToolError(f"{shown}: cannot be read ({reason}); check the address") from None


def _is_timeout(error: BaseException | None) -> bool:
    """Whether an error or one of its causes is a timeout."""
    while error is not None:
        if isinstance(error, TimeoutError):
            return True
        error = error.__cause__ or error.__context__
    return False


def remote_file(url: str) -> RemoteFile:
    """Open a remote file. Raises ToolError."""
    return RemoteFile(url)


@contextlib.contextmanager
def local_copy(source: str | Path, *, progress: ProgressOf = silent) -> Iterator[Path]:
    """Yield a local path: the source itself if it is local, else a temporary copy under its own name.

    hf:// names and repositories (`org/name[@revision]`) use the hub's cache. Raises ToolError, CheckpointError.
    """
    name = hub_name(source)
    if name is not None:
        yield hub_file(name)  # it remains in the hub's cache
        return
    if not is_remote(source):
        yield Path(source)
        return
    url = str(source)
    remote = remote_file(url)
    file_name = PurePosixPath(_hub_form(url).partition("?")[0]).name or "delta.pxd"
    with scratch_folder() as folder:
        target = folder / file_name
        with progress(f"fetch {file_name}", remote.size) as step:
            remote.download(target, progress=step)
        yield target
