"""Folders that appear under their final name whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from peraxis_format import sync_folder
from peraxis_tools.errors import ToolError

__all__ = ["atomic_folder", "refuse_existing"]


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise ToolError where the output stands already (an empty folder does not count), before any work."""
    if overwrite or not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    raise ToolError(f"{path}: exists already; choose another output or pass --overwrite")


@contextlib.contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Make a temporary folder beside `path`; on success rename it, else remove it with all that is in it.

    With overwrite, what stood under `path` is removed after the new folder has its name.
    """
    refuse_existing(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    temporary = path.with_name(f".{path.name}.{token}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for file in (path for path in temporary.rglob("*") if path.is_file()):
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        old = path.with_name(f".{path.name}.{token}.old")
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    elif old.exists():
        old.unlink()
