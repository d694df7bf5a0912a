"""Checkpoints by folder, file or hub id: their tensors, their identity, and the small files beside them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from peraxis_format import CheckpointError, Identity, PxdError, Safetensors
from peraxis_format import open as pxd_open
from peraxis_format.hub import hub_errors, hub_reason
from peraxis_tools.checkpoints.assets import FolderAssets, find_assets
from peraxis_tools.checkpoints.json_files import json_object
from peraxis_tools.display.notes import note
from peraxis_tools.errors import ToolError
from peraxis_tools.process.optional import require
from peraxis_tools.remote.names import HUB_NAME, names_a_file

__all__ = ["Checkpoint", "is_delta", "open_checkpoint", "parse_identity", "refuse_swapped", "with_revision"]

_HUB_PAGE: Final = re.compile(r"(?:hf://(?:models/)?|https://(?:huggingface\.co|hf\.co)/)([\w.-]+/[\w.-]+)")

_HUB_PATTERNS: Final = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One opened checkpoint. A context manager.

    tensors: its safetensors, by name. identity: its name in manifests. folder: the folder of its small files, None for
    a bare file. newer: small files of updates on it, which take the place of their groups.
    """

    tensors: Safetensors
    identity: Identity
    folder: Path | None
    newer: Mapping[str, bytes] = field(default_factory=dict)

    def assets(self, *, checked: bool = True) -> Iterator[tuple[str, bytes]]:
        """Configuration, tokenizer, processor and chat templates: path and bytes, in path order (SPEC 3.12).

        checked: see FolderAssets.read.
        """
        found = self.folder_assets()
        for path in found.carried:
            yield path, found.read(path, checked=checked)

    def folder_assets(self) -> FolderAssets:
        """The files of the folder that a delta contains, and those that it leaves out."""
        found = FolderAssets(folder=Path()) if self.folder is None else find_assets(self.folder)
        return found.with_groups_of(self.newer)

    def config(self) -> dict[str, Any]:
        """The parsed config.json. Raises ToolError if there is none."""
        path = None if self.folder is None else self.folder / "config.json"
        if path is None or not path.is_file():
            raise ToolError(f"{self.tensors.label}: has no config.json beside it; pass the checkpoint's folder")
        return json_object(path.read_bytes(), str(path))

    def close(self) -> None:
        """Close its files."""
        self.tensors.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint: a folder, a safetensors file or index, or a hub id (`org/name` or `org/name@revision`).

    A name that exists on disk is never looked up on the hub, and has no revision. Raises CheckpointError, ToolError.
    """
    source = with_revision(source, revision)
    path = Path(source)
    if path.exists():
        if is_delta(path):
            raise CheckpointError(f"{source}: is a delta, not a checkpoint; pass a folder or a safetensors file here")
        folder = path if path.is_dir() else path.parent
        return Checkpoint(_opened(path), _identity(path, folder), folder)
    if not HUB_NAME.fullmatch(str(source)) or names_a_file(str(source)):
        page = _HUB_PAGE.match(str(source))
        if page is not None:
            raise CheckpointError(f"{source}: is the address of a repository on the hub; pass {page[1]}")
        raise CheckpointError(f"{source}: no such file or folder, and not a hub id (org/name or org/name@revision)")
    hub_id, _, at = str(source).partition("@")
    folder = _download(hub_id, at or None)
    # A snapshot's folder is named by the commit of the revision.
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{hub_id}: has no safetensors checkpoint at this revision; save its model with save_pretrained first"
        )
    return Checkpoint(_opened(folder), Identity(id=hub_id, revision=folder.name), folder)


def with_revision(source: str | Path, revision: str | None) -> str | Path:
    """A checkpoint's name as `org/name@revision`; the name itself without a revision.

    Raises ToolError for a name on disk, which has no revision, and for one that has another revision.
    """
    if revision is None:
        return source
    if Path(source).exists():
        raise ToolError(
            f"{source}: is on this machine and has no revision {revision!r}; leave it out, or pass a hub id "
            "(compress records the id of a folder with base_id (--base-id))"
        )
    name, _, named = str(source).partition("@")
    if named and named != revision:
        raise ToolError(f"{source}: names a revision already, which is not {revision!r}; leave one of them out")
    return f"{name}@{revision}"


def is_delta(source: str | Path) -> bool:
    """Whether this is a .pxd file on this machine, by its first bytes."""
    path = Path(source)
    if not path.is_file():
        return False
    try:
        with pxd_open(path):
            return True
    except PxdError as error:
        return path.suffix == ".pxd" or error.code > "E112"
    except OSError:
        return path.suffix == ".pxd"


def refuse_swapped(checkpoint: str | Path, delta: str | Path) -> None:
    """Raise ToolError if a delta is in the place of a checkpoint and a checkpoint's folder in that of a delta."""
    if is_delta(checkpoint) and Path(delta).is_dir():
        raise ToolError(f"{checkpoint} is a delta and {delta} is not; pass them in the other order")


def parse_identity(text: str) -> Identity:
    """`org/name` or `org/name@revision`. Raises ToolError for anything else."""
    if not HUB_NAME.fullmatch(text):
        raise ToolError(f"{text}: not a hub id; pass org/name or org/name@revision")
    hub_id, _, revision = text.partition("@")
    return Identity(id=hub_id, revision=revision or None)


def _identity(path: Path, folder: Path) -> Identity:
    """The hub id and commit of a snapshot in the hub's cache; else the name of the folder or file."""
    *_, repository, snapshots, commit = ("", "", "", *folder.absolute().parts)
    if snapshots == "snapshots" and repository.startswith("models--"):
        return Identity(id=repository.removeprefix("models--").replace("--", "/", 1), revision=commit)
    own = path.resolve().name if path.is_dir() else path.name
    # A manifest is UTF-8; a name on disk can be any bytes.
    return Identity(id=os.fsencode(own).decode("utf-8", "replace"))


def _opened(path: Path) -> Safetensors:
    tensors = Safetensors.open(path)
    for sentence in tensors.ignored:
        note(sentence)
    return tensors


def _download(hub_id: str, revision: str | None) -> Path:
    require(f"{hub_id} (a hub id)", "huggingface_hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_PATTERNS))
    except hub_errors() as error:
        raise CheckpointError(f"{hub_id}: cannot be fetched from the hub: {hub_reason(error)}") from None
