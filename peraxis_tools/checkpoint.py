"""Checkpoints by folder, file or hub id: their tensors, what they are called, and the small files beside them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from peraxis_format import ASSET_PATH, CheckpointError, Identity, Safetensors
from peraxis_tools.errors import ToolError

__all__ = ["ASSET_BYTES_MAX", "Checkpoint", "is_tokenizer_asset", "open_checkpoint"]

ASSET_BYTES_MAX: Final = 64 << 20
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_CONFIGS: Final = frozenset({"config.json", "generation_config.json"})
_TOKENIZER: Final = frozenset(
    {
        "added_tokens.json",
        "chat_template.json",
        "merges.txt",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
_TOKENIZER_SUFFIXES: Final = (".jinja", ".model", ".tiktoken")
_HUB_PATTERNS: Final = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


def is_tokenizer_asset(name: str) -> bool:
    """Whether a file of a checkpoint's folder belongs to its tokenizer."""
    return name in _TOKENIZER or name.endswith(_TOKENIZER_SUFFIXES)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One opened checkpoint. A context manager.

    tensors: its safetensors, by name. identity: what manifests call it. folder: where its small files are,
    None for a bare file.
    """

    tensors: Safetensors
    identity: Identity
    folder: Path | None

    def assets(self) -> Iterator[tuple[str, bytes]]:
        """Configuration, tokenizer and chat template: name and bytes, in name order (SPEC 3.12)."""
        for path in sorted(self.folder.iterdir()) if self.folder is not None else ():
            wanted = path.name in _CONFIGS or is_tokenizer_asset(path.name)
            if not wanted or not path.is_file() or not ASSET_PATH.fullmatch(path.name):
                continue
            size = path.stat().st_size
            if size > ASSET_BYTES_MAX:
                raise ToolError(f"{path}: {size} bytes is too much for an asset; move it out of the folder")
            if size:
                yield path.name, path.read_bytes()

    def config(self) -> dict[str, Any]:
        """The parsed config.json. Raises ToolError where there is none."""
        path = None if self.folder is None else self.folder / "config.json"
        if path is None or not path.is_file():
            raise ToolError(f"{self.tensors.label}: has no config.json beside it; pass the checkpoint's folder")
        try:
            config = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ToolError(f"{path}: not JSON ({error})") from None
        if not isinstance(config, dict):
            raise ToolError(f"{path}: not a JSON object")
        return config

    def close(self) -> None:
        """Close its files."""
        self.tensors.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint: a folder, a safetensors file or index, or a hub id (`org/name` or `org/name@revision`).

    What exists on disk is never looked up on the hub. Raises CheckpointError, ToolError.
    """
    path = Path(source)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        own = path.resolve().name if path.is_dir() else path.name
        # A manifest is UTF-8; a name on disk may be any bytes.
        name = os.fsencode(own).decode("utf-8", "replace")
        return Checkpoint(Safetensors.open(path), Identity(id=name, revision=revision), folder)
    if not _HUB_ID.fullmatch(str(source)):
        raise CheckpointError(f"{source}: no such file or folder, and not a hub id (org/name or org/name@revision)")
    hub_id, _, at = str(source).partition("@")
    folder = _download(hub_id, at or revision)
    # A snapshot's folder is named by the commit that the revision stood for.
    return Checkpoint(Safetensors.open(folder), Identity(id=hub_id, revision=folder.name), folder)


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{hub_id}: cannot be fetched from the hub: {reason}") from None
