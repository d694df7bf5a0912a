"""Files by URL: any URL of fsspec (https, s3, gs, ...) and hf://org/repo/file.pxd, with @revision.

A header is read by range requests. Verbs that need the payload fetch the file once into a temporary folder. Fetched
bytes are not trusted: the same checks follow as for a local file. A file:// URL of a whole file or of an output is the
path that it names. remote_output.py writes outputs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from glob import glob, has_magic
from pathlib import Path, PurePosixPath
from typing import Any, Final

import peraxis_format as pxd
from peraxis_format.hub import hub_file, hub_files, hub_name
from peraxis_format.urls import SILENCE_SECONDS, http_options, is_http
from peraxis_tools.display.progress import ProgressOf, silent
from peraxis_tools.errors import ToolError, first_line
from peraxis_tools.outputs.folders import scratch_folder
from peraxis_tools.process.optional import missing, require
from peraxis_tools.remote.http_reads import AnswerError, read_range, refusal, save_all
from peraxis_tools.remote.urls import file_of, local_path, without_secrets

__all__ = ["RemoteFile", "deltas_of", "hub_form", "local_copy", "patience", "readable", "refuse_closed"]

_START: Final = 1 << 16  # cached bytes of a file's beginning, at most
# Users write hf://org/repo/path@revision; the hub's file system needs hf://org/repo@revision/path.
_HUB: Final = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)/(?P<path>[^@]+)@(?P<revision>[^@]+)")


def hub_form(url: str) -> str:
    match = _HUB.fullmatch(url)
    if match is None:
        return url
    revision = match["revision"].replace("/", "%2F")
    return f"hf://{match['repo']}@{revision}/{match['path']}"


class RemoteFile:
    """One remote file: its size and ranges of its bytes. requested counts the requested bytes. Raises ToolError."""

    def __init__(self, url: str) -> None:
        self.url = without_secrets(url)
        self.requested = 0
        self._start = b""
        require(self.url, "fsspec")
        with readable(url):
            import fsspec

            self._system, self._path = fsspec.core.url_to_fs(hub_form(url), **patience(url))
            size = self._system.size(self._path)
        if size is None:
            raise ToolError(f"{self.url}: the server does not say how large the file is; download it and pass the file")
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
        with readable(self.url):
            if is_http(self.url):
                data = read_range(self._system, self._path, offset, end)
            else:
                data = self._system.cat_file(self._path, start=offset, end=end)
        self.requested += len(data)
        if len(data) != end - offset:
            raise ToolError(f"{self.url}: the server sent {len(data)} bytes for a range of {end - offset}; try again")
        return data

    def header(self) -> tuple[pxd.Header, pxd.Manifest]:
        """Read and check the header alone (steps 1 to 8 of SPEC 8). Raises ContainerError, ProfileError."""
        try:
            return pxd.read_header(self.read, self.size)
        except pxd.PxdError as error:
            error.file = self.url
            raise

    def download(self, target: Path, *, progress: Callable[[int], None] | None = None) -> None:
        """Write the whole file to target in blocks; each byte is requested once.

        Raises ToolError if there is no room for it, and if the server sends another number of bytes than `size`; it is
        stopped at that number.
        """
        room = shutil.disk_usage(target.parent).free
        if self.size > room:
            shown = next(folder for folder in target.parents if not folder.name.startswith(".peraxis~"))
            raise ToolError(
                f"{self.url}: has {self.size} bytes; {shown} has room for {room}; set TMPDIR to another disk"
            )
        step = progress or (lambda _: None)
        with readable(self.url):
            if is_http(self.url):
                with open(target, "wb") as file:
                    save_all(self._system, self._path, file, self.size, step)
                return
            from fsspec.callbacks import Callback

            left = self.size

            class Steps(Callback):  # type: ignore[misc, unused-ignore]
                """Passes numbers of bytes to `step`, and stops a file that is longer than it was said to be."""

                def relative_update(self, inc: int = 1) -> None:
                    nonlocal left
                    left -= inc
                    if left < 0:
                        raise AnswerError("is longer than its store said; fetch it again")
                    step(inc)

            self._system.get_file(self._path, str(target), callback=Steps())
        if target.stat().st_size != self.size:
            raise ToolError(f"{self.url}: has {target.stat().st_size} bytes, not {self.size}; fetch it again")


def patience(url: str) -> dict[str, Any]:
    """The options of a URL's file system."""
    return http_options(url, silence=SILENCE_SECONDS)


@contextlib.contextmanager
def readable(url: str, *, done: str = "read") -> Iterator[None]:
    """Turn all errors of a file system library into a ToolError of one line. done: the failed action, a participle."""
    shown = without_secrets(url)
    try:
        yield
    except (pxd.PxdError, ToolError):
        raise
    except AnswerError as error:
        raise ToolError(f"{shown}: {error}") from None
    except ImportError as error:
        raise missing(shown, error) from None
    except ValueError as error:
        raise ToolError(f"{shown}: {without_secrets(first_line(error))}") from None
    except Exception as error:  # aiohttp, botocore, huggingface_hub: each has its own hierarchy
        if _is_timeout(error):
            silence = f"the server sent nothing for {SILENCE_SECONDS:g} s; try again later"
            raise ToolError(f"{shown}: {silence}") from None
        if (answered := refusal(error)) is not None:
            raise ToolError(f"{shown}: {answered}") from None
        reason = f"{type(error).__name__}: {without_secrets(first_line(error))}"
        raise ToolError(f"{shown}: cannot be {done} ({reason}); check the address") from None


def _is_timeout(error: BaseException | None) -> bool:
    """Whether an error or one of its causes is a timeout."""
    while error is not None:
        if isinstance(error, TimeoutError):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def local_copy(source: str | Path, *, progress: ProgressOf = silent) -> Iterator[Path]:
    """Yield a local path: the source itself if it is local, else a temporary copy under its own name.

    hf:// names and repositories (`org/name[@revision]`) use the hub's cache. Raises ToolError, CheckpointError.
    """
    name = hub_name(source)
    if name is not None:
        yield hub_file(name)  # it remains in the hub's cache
        return
    here = local_path(source)
    if here is not None:
        yield here
        return
    url = str(source)
    remote = RemoteFile(url)
    file_name = PurePosixPath(hub_form(url).partition("?")[0]).name or "delta.pxd"
    with scratch_folder() as folder:
        target = folder / file_name
        with progress(f"fetch {file_name}", remote.size) as step:
            remote.download(target, progress=step)
        try:
            yield target
        except pxd.PxdError as error:
            if error.file == str(target):
                error.file = remote.url  # the user knows no other name of it
            raise


def deltas_of(source: str | Path) -> list[str | Path]:
    """The deltas of a source: itself if it is a file, else every .pxd of the folder, by name.

    A folder is a path, a URL of one or with `*` in it (any file system except http), or a repository on the hub. Raises
    ToolError, CheckpointError.
    """
    hub = hub_name(source)
    if hub is not None:
        return [source] if (hub.file or "").endswith(".pxd") else list(hub_files(hub))
    here = local_path(source)
    if file_of(source) is not None and "*" in str(here):
        return _some(source, sorted(glob(str(here))))
    if here is not None:
        return _some(source, sorted(here.glob("*.pxd"))) if here.is_dir() else [here]
    url = str(source)
    if is_http(url):
        return [source]
    require(without_secrets(url), "fsspec")
    with readable(url):
        import fsspec

        system, path_there = fsspec.core.url_to_fs(url)
        wanted = path_there if "*" in path_there else f"{path_there.rstrip('/')}/*.pxd"
        if wanted != path_there and not system.isdir(path_there):
            return [source]
        return _some(without_secrets(url), [system.unstrip_protocol(name) for name in sorted(system.glob(wanted))])


def refuse_closed(pattern: str) -> None:
    """Raise OSError if the folder of a glob cannot be listed; one with a glob in its own name is not looked at."""
    folder = os.path.dirname(pattern) or "."
    if not has_magic(folder) and os.path.isdir(folder):
        os.listdir(folder)


def _some(source: str | Path, found: list[Any]) -> list[Any]:
    if not found:
        here = str(file_of(source) or source)
        if os.path.isdir(here):
            os.listdir(here)
        elif has_magic(here):
            refuse_closed(here)
        raise ToolError(f"{source}: has no .pxd files; check the name")
    return found
