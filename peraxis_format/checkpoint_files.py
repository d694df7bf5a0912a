"""Find the files of a checkpoint in a folder, in the order of transformers.

    transformers_weights of config.json  >  model.safetensors  >  model.safetensors.index.json  >  all *.safetensors

The first that exists is the checkpoint; `ignored` lists the other files. With an index a tensor is read from the file
that the index names, even if other files have it too. Files of other formats are recognised by their first bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from peraxis_format.errors import CheckpointError

__all__ = ["INDEX_NAME", "SINGLE_NAME", "CheckpointFiles", "find_files", "foreign_kind"]

SINGLE_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"
_ADAPTER_NAME: Final = "adapter_model.safetensors"
_INDEX_SUFFIX: Final = ".safetensors.index.json"
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# First bytes of files that are not safetensors, the kind of file, and the remedy.
_FOREIGN: Final = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"),
    (b"GGUF", "a GGUF file; pass the safetensors checkpoint that it was made from"),
    (b"PK\x03\x04", "a torch archive (a pickle); save the model with save_pretrained first"),
    (b"\x80\x02", "a pickle; save the model with save_pretrained first"),
    (b"\x80\x04", "a pickle; save the model with save_pretrained first"),
    (b"<!doctype", "an HTML page, not the file itself; fetch it again"),
    (b"<html", "an HTML page, not the file itself; fetch it again"),
    (b"\x89HDF", "an HDF5 file; save the model with save_pretrained first"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFiles:
    """The files of one checkpoint.

    owners: by tensor, the name of the file that an index names; empty without an index. ignored: a sentence for the
    files of the folder that are not read, with the reason.
    """

    files: tuple[Path, ...]
    owners: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def find_files(path: Path) -> CheckpointFiles:
    """The checkpoint of a folder or an index, or a single file. Raises CheckpointError if there is none."""
    if path.is_dir():
        return _of_folder(path)
    if path.name.endswith(".index.json") and path.is_file():
        return _indexed(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder; pass a checkpoint's folder or hub id")
    return CheckpointFiles(files=(path,))


def foreign_kind(start: bytes) -> str | None:
    """The kind of a file with these first bytes, and the remedy; None if it may be safetensors."""
    # A header may begin with white space (SPEC 7.5); its length is then told from text by its zeros.
    if start[8:9] == b"{" or (start[4:8] == bytes(4) and start[8:9] in (b" ", b"\t", b"\r", b"\n")):
        return None
    lowered = start.lstrip()[:32].lower()
    for magic, kind in _FOREIGN:
        if start.startswith(magic) or (magic[:1] == b"<" and lowered.startswith(magic)):
            return kind
    return "a file of zeros; fetch it again" if start and not any(start) else None


def _of_folder(folder: Path) -> CheckpointFiles:
    explicit = _explicit(folder)
    if explicit is not None:
        return _with_ignored(folder, _named(folder, explicit), f"config.json names {explicit}")
    if (folder / SINGLE_NAME).is_file():
        found = CheckpointFiles(files=(folder / SINGLE_NAME,))
        return _with_ignored(folder, found, f"{SINGLE_NAME} comes first, as in transformers")
    if (folder / INDEX_NAME).is_file():
        return _with_ignored(folder, _indexed(folder / INDEX_NAME), f"{INDEX_NAME} does not list it")
    files = sorted(path for path in folder.glob("*.safetensors") if path.name != _ADAPTER_NAME)
    if not files:
        raise CheckpointError(f"{folder}: has no safetensors checkpoint; {_hint(folder)}")
    strange = next((path for path in files if not path.is_file()), None)  # reading a pipe would wait for a writer
    if strange is not None:
        raise CheckpointError(f"{strange}: is not a file, or a link to none; fetch the checkpoint again")
    found = CheckpointFiles(files=tuple(files))
    return _with_ignored(folder, found, f"an adapter, or an index that is not {INDEX_NAME}")


def _explicit(folder: Path) -> str | None:
    """The file that config.json names in transformers_weights."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes()) if path.is_file() else None  # a pipe would be waited for
    except (OSError, ValueError, RecursionError):
        return None
    name = config.get("transformers_weights") if isinstance(config, dict) else None
    return name if isinstance(name, str) and name.endswith((".safetensors", _INDEX_SUFFIX)) else None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _named(folder: Path, name: str) -> CheckpointFiles:
    if name != Path(name).name:
        raise CheckpointError(
            f"{folder}/config.json: transformers_weights names {name!r}, not a plain file name; correct it"
        )
    if not _is_file(folder / name):
        raise CheckpointError(f"{folder}/{name}: missing, although config.json names it; fetch the checkpoint again")
    return find_files(folder / name)


def _indexed(index: Path) -> CheckpointFiles:
    try:
        owners = json.loads(index.read_bytes())["weight_map"]
        plain = all(isinstance(name, str) and name == Path(name).name for name in owners.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        plain, owners = False, {}
    if not plain or not owners:
        raise CheckpointError(f"{index}: not a safetensors index (a weight_map of plain file names); fetch it again")
    names = sorted(set(owners.values()))  # an index may name a million files; paths are made of those that exist
    lost = next((name for name in names if not _is_file(index.parent / name)), None)
    if lost is not None:
        raise CheckpointError(
            f"{index.parent / lost}: missing, although {index.name} lists it; fetch the checkpoint again"
        )
    return CheckpointFiles(files=tuple(index.parent / name for name in names), owners=owners)


def _with_ignored(folder: Path, found: CheckpointFiles, reason: str) -> CheckpointFiles:
    """`found` with a note on the other weights and indexes of the folder."""
    read = {path.name for path in found.files} | {INDEX_NAME for _ in found.owners}
    others = sorted(
        path.name
        for path in folder.iterdir()
        if path.name.endswith((".safetensors", _INDEX_SUFFIX)) and path.name not in read and path.is_file()
    )
    if not others:
        return found
    names = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
    ignored = (f"{folder}: {names} not read: {reason}",)
    return CheckpointFiles(files=found.files, owners=found.owners, ignored=ignored)


def _hint(folder: Path) -> str:
    if (folder / _ADAPTER_NAME).is_file() or (folder / "adapter_config.json").is_file():
        return "it is a LoRA adapter: merge it into its base first (PEFT: merge_and_unload, save_pretrained)"
    old = next((path for pattern in _PICKLES for path in sorted(folder.glob(pattern))), None)
    if old is not None:
        return f"{old.name} is a pickle: save the model with save_pretrained first"
    gguf = next(iter(sorted(folder.glob("*.gguf"))), None)
    if gguf is not None:
        return f"{gguf.name} is a GGUF file: pass the safetensors checkpoint that it was made from"
    return "pass the folder that config.json is in"
