"""Deltas by name: a path, `hf://org/repo[/file.pxd][@revision]`, or a repository, `org/repo[@revision]`.

A repository without a file name means its only .pxd. Files come through huggingface_hub and its cache, so a fetched
file is available without a network (HF_HUB_OFFLINE=1). Its bytes are not trusted: the checks of SPEC 8 follow as for
any file. This needs huggingface_hub, which is imported when a name has to be looked up.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from peraxis_format.errors import CheckpointError, first_line

__all__ = ["HubName", "commit_new_file", "hub_errors", "hub_file", "hub_files", "hub_name", "hub_path", "hub_reason"]

_TRIES: Final = 8  # commits of others to other files that may come in between
_MOVED: Final = 412  # status: the parent commit is no longer the newest one
_WORD: Final = r"[A-Za-z0-9][\w.-]*"
_ID: Final = re.compile(rf"(?P<repository>{_WORD}/{_WORD})(@(?P<revision>[\w./-]+))?")
_URL: Final = re.compile(
    rf"hf://(?P<repository>{_WORD}/{_WORD})(@(?P<before>[^/@]+))?(/(?P<file>[^@]+))?(@(?P<after>[^@]+))?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubName:
    """One delta on the hub. file: a path in the repository; None: its one .pxd. revision: branch, tag or commit."""

    repository: str
    file: str | None = None
    revision: str | None = None


def hub_name(source: str | os.PathLike[str]) -> HubName | None:
    """Parse a name on the hub; None for a path and for any other URL.

    A name that exists on disk is never looked up on the hub, and a name that ends in .pxd is a path.
    Raises CheckpointError for a malformed hf:// name.
    """
    text = str(source) if isinstance(source, str) else os.fspath(source)
    if text.startswith(("hf://datasets/", "hf://spaces/")):
        return None  # left to fsspec, as any other URL
    if text.startswith("hf://"):
        found = _URL.fullmatch(text)
        if found is None or (found["before"] and found["after"]):
            raise CheckpointError(f"{text}: malformed; write hf://org/repo/file.pxd or hf://org/repo@revision/file.pxd")
        revision = (found["before"] or found["after"] or "").replace("%2F", "/") or None
        return HubName(repository=found["repository"], file=found["file"], revision=revision)
    found = _ID.fullmatch(text)
    if found is None or text.endswith(".pxd") or os.path.exists(text):
        return None
    return HubName(repository=found["repository"], revision=found["revision"])


def hub_errors() -> tuple[type[Exception], ...]:
    """The exceptions of huggingface_hub, the errors of its HTTP library included. Raises ImportError without it."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    return HfHubHTTPError, EntryNotFoundError, LocalEntryNotFoundError, ValueError, *_unreachable()


def _unreachable() -> tuple[type[Exception], ...]:
    """OSError (offline mode) and the error of the HTTP library, whose package differs by version."""
    from huggingface_hub.errors import HfHubHTTPError

    return cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)


def hub_reason(error: BaseException) -> str:
    """One line of an error of the hub: that of its cause, if the library only adds that the cache has no copy."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError) and (error.__cause__ or error.__context__) is not None:
        error = error.__cause__ or error.__context__ or error
    return first_line(error).removeprefix("Got: ")


def hub_path(source: str | os.PathLike[str]) -> Path:
    """The local path of a delta: the source itself, or a path in the hub's cache. Raises CheckpointError."""
    name = hub_name(source)
    return Path(source) if name is None else hub_file(name)


def hub_file(name: HubName) -> Path:
    """The path of a delta in the hub's cache; it is fetched if it is not there.

    Raises CheckpointError: no such repository, several files, no network and nothing in the cache.
    """
    with _errors_about(name):
        from huggingface_hub import hf_hub_download

        file = name.file or _only_delta(name)
        return Path(hf_hub_download(name.repository, file, revision=name.revision))


def hub_files(name: HubName) -> list[str]:
    """The deltas of a repository, or of the folder `name.file` in it, as sorted hf:// names.

    Raises CheckpointError: no such repository, no deltas, no network and nothing in the cache.
    """
    with _errors_about(name):
        there = _listed(name)
    folder = f"{name.file.rstrip('/')}/" if name.file else ""
    found = sorted(
        file for file in there
        if file.startswith(folder) and file.endswith(".pxd") and "/" not in file[len(folder) :]
    )  # fmt: skip
    if not found:
        raise CheckpointError(f"{name.repository}/{folder}: has no .pxd files; check the name")
    at = f"@{name.revision.replace('/', '%2F')}" if name.revision else ""
    return [f"hf://{name.repository}{at}/{file}" for file in found]


@contextlib.contextmanager
def _errors_about(name: HubName) -> Iterator[None]:
    """Turn errors of the hub, and a missing huggingface_hub, into a CheckpointError."""
    try:
        errors = hub_errors()
    except ImportError:
        raise CheckpointError(f"{name.repository}: needs huggingface_hub; install it, or pass a path") from None
    try:
        yield
    except errors as error:
        raise CheckpointError(f"{name.repository}: cannot be fetched from the hub: {hub_reason(error)}") from None


def _only_delta(name: HubName) -> str:
    found = sorted(file for file in _listed(name) if file.endswith(".pxd"))
    if len(found) != 1:
        shown = ", ".join(found[:5]) or "none"
        raise CheckpointError(
            f"{name.repository}: has {len(found)} .pxd files ({shown}); name one as hf://{name.repository}/FILE"
        )
    return found[0]


def _listed(name: HubName) -> list[str]:
    """The files of a repository; if the hub cannot be reached, those in the cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi().list_repo_files(name.repository, revision=name.revision)
    except HfHubHTTPError:
        raise  # the hub answered
    except _unreachable():
        folder = Path(snapshot_download(name.repository, revision=name.revision, local_files_only=True))
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*.pxd")]


def commit_new_file(
    local: Path,
    path: str,
    *,
    repository: str,
    kind: str,
    revision: str,
    endpoint: str | None,
    token: str | bool | None,
) -> None:
    """Add a file to a repository on the hub by one commit, unless the repository has a file of this path.

    kind: model, dataset or space. Commits by others that come in between are looked at: only one with this file is a
    conflict. Raises FileExistsError, and the errors of huggingface_hub.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(endpoint=endpoint, token=token)
    for attempt in range(_TRIES):
        head = api.repo_info(repository, repo_type=kind, revision=revision).sha
        if api.file_exists(repository, path, repo_type=kind, revision=head):
            raise FileExistsError(path)
        try:
            api.create_commit(
                repository,
                [CommitOperationAdd(path_in_repo=path, path_or_fileobj=str(local))],
                commit_message=f"Add {path}",
                repo_type=kind,
                revision=revision,
                parent_commit=head,
            )
        except HfHubHTTPError as error:
            if getattr(error.response, "status_code", None) != _MOVED or attempt == _TRIES - 1:
                raise
        else:
            return
